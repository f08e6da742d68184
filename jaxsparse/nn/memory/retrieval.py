# SPDX-License-Identifier: Apache-2.0
"""From a token's input to the slots that it reads and their weights.

The steps that the members of the family share: a query, its norm, scores of
all row and column keys, the best cells of the grid, an activation, addresses.

Letters: B batch, T positions, D model width, q query width, w key width, Q
logical keys per axis, P heads, r ranks, c weights of a cell, k selected cells
per head, E virtual blocks, M rows.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.config import MemoryConfig
from jaxsparse.nn.memory import key_scores
from jaxsparse.nn.memory.context import Context, convolve
from jaxsparse.nn.memory.key_scores import norm
from jaxsparse.nn.parameter import Parameter
from jaxsparse.ops.kernels import retrieve as kernel
from jaxsparse.ops.memory import addressing, usage
from jaxsparse.ops.memory.folded_keys import FoldedKeys
from jaxsparse.ops.memory.product_key import product_key_top_m
from jaxsparse.ops.memory.tucker import Directions, tucker_top_m
from jaxsparse.ops.shard_map_vma import match_vma
from jaxsparse.ops.token_product import token_product

# Arrays by name; None for 'pools' if there is only one.
Read = dict[str, Any]


def retrieve(
  weights: dict[str, Parameter],
  x: Float[Array, 'B T D'],
  config: MemoryConfig,
  *,
  segment_ids: Int[Array, 'B T'] | None = None,
  context: Context | None = None,
  directions: Directions | None = None,
  permutation: Int[Array, 'V'] | None = None,
  salt: int = 0,
  first_row: int = 0,
) -> Read:
  """Scores keys, selects slots and returns their indices and weights.

  It performs no table lookup.

  Args:
    weights: the layer's parameters, gathered.
    x: input of each position.
    config: of the layer.
    segment_ids: documents, between which the query convolution does not look;
      0 for padding.
    context: the inputs before `x` that this convolution looks back to.
    directions: pre-filter vectors of an imported checkpoint.
    permutation: table of virtual addresses of an imported checkpoint.
    salt: picks the bijection of addresses.
    first_row: of the layer's window in a shared table.

  Returns:
    'scores' [B, T, P, k, c] of the kept cells; 'weights' [B, T, P * k, c] after
    the activation; 'slots' [B, T, P * k] that the layer addresses, the table's
    'rows' that they are, and 'pools', or None where there is one pool; 'counts'
    of the slots by all tokens of the batch that are no padding: [M], or in a
    large memory on one device those of the slots that are read.
  """
  h = x
  if 'query_conv' in weights:
    h = convolve(x, weights['query_conv'].astype(x.dtype), segment_ids, context)
  # [D, 2, q] with heads or ranks before the width where they have their own.
  matrix = weights['query'].astype(x.dtype)
  dims = 'xyz'[: matrix.ndim - 1]
  query = token_product(f'd,d{dims}->{dims}', h, matrix)
  if 'query_bias' in weights:
    query += weights['query_bias'].astype(x.dtype)[None, None]
  keys = weights['keys']
  if not isinstance(keys, FoldedKeys):
    keys = norm(keys, weights.get('key_scale'), -2, config.key_norm)

  is_token = None if segment_ids is None else segment_ids > 0
  # The counts of several devices are added up slot by slot.
  is_alone = mesh.num_token_shards() == 1 and not mesh.inside()
  is_large = config.num_slots > usage.MOST_COUNTED and is_alone

  def on_device(is_token, query, *arrays):
    *found, slot = _best_slots(query, *arrays, config, salt, first_row)
    if is_token is not None:
      is_token = jnp.broadcast_to(is_token[..., None], slot.shape)
    if is_large:
      counts = usage.counts_of_used(slot, is_token)
    else:
      counts = usage.count_uses(slot, config.num_slots, is_token)
    return *found, slot, counts[None]

  names = ('scores', 'weights', 'rows', 'pools', 'slots', 'counts')
  found = mesh.over_tokens(on_device, (2, 3, 4, 5, 6))(
    is_token,
    query,
    weights.get('query_scale'),
    keys,
    weights.get('cores'),
    directions,
    permutation,
  )
  read = dict(zip(names, found, strict=True))
  return read | dict(counts=mesh.total(read['counts'].sum(0)))


def _best_slots(
  query, scale, keys, cores, directions, permutation, config, salt, first_row
):
  """One device's tokens: query [B, T, 2, ..., q]."""
  batch = query.shape[:2]
  query = query.reshape(-1, *query.shape[2:])
  if directions is None and isinstance(keys, FoldedKeys):
    directions = keys.directions
  arrays = query, scale, keys, cores, directions, permutation
  # One position of each sequence: a decode step.
  is_decoding = batch[1] == 1
  found = _by_kernel(*arrays, config, salt) if is_decoding else None
  scores, slot, block = found or _by_steps(*arrays, config, salt, is_decoding)
  row_of_table = slot
  if config.shared_rows:
    row_of_table = _in_window(slot, first_row, config.shared_rows)
  weight = _activate(scores, config.score_activation)
  scores = scores.reshape(*batch, *scores.shape[1:])
  slot, row_of_table, block = (
    x.reshape(*batch, -1) for x in (slot, row_of_table, block)
  )
  weight = weight.reshape(*slot.shape, -1)
  if config.num_pools == 1:
    block = None
  return scores, weight, row_of_table, block, slot


def _by_steps(
  query, scale, keys, cores, directions, permutation, config, salt, is_stable
):
  """Scores [T, P, k, c] of the kept cells, their slots and virtual blocks."""
  query = norm(query, scale, -1, config.query_norm)
  row, column = key_scores.of_ranks(query, keys, config)
  if config.grid == 'additive':
    scores, address = product_key_top_m(
      row[..., 0],
      column[..., 0],
      config.num_selected,
      is_stable=is_stable,
    )
    scores = scores[..., None]
  else:
    if config.cores_per_pairing:
      row, column = (_by_key_set(x, config.expansion) for x in (row, column))
    scores, address = tucker_top_m(
      row,
      column,
      cores,
      config.num_selected,
      directions=directions,
      two_quadrants=config.use_two_quadrants,
      is_stable=is_stable,
    )
  if permutation is None:
    virtual = addressing.shuffle(address, config.num_logical_keys, salt)
  else:
    virtual = addressing.look_up(address, permutation)
  block, slot = addressing.split(virtual, config.num_slots)
  return scores, slot, block


def _by_kernel(
  query, scale, keys, cores, directions, permutation, config, salt
):
  """As `_by_steps` in one kernel of a GPU, or None where there is none.

  A query's RMS is a factor of all of its scores, which need not wait for it.
  """
  is_served = config.grid == 'tucker' and not (
    config.cores_per_pairing
    or config.use_two_quadrants
    or config.share_keys
    or config.query == 'per_head'
    or permutation is not None
  )
  is_folded = isinstance(keys, FoldedKeys)
  if not (is_served and is_folded) or mesh.platform() != 'gpu':
    return None
  factor = None
  if config.query_norm == 'rms' and config.query == 'shared':
    factor = key_scores.rms_factor(query)
  else:
    query = norm(query, scale, -1, config.query_norm)
  scores = key_scores.by_folded(query, keys, config)
  scores, cores, directions, factor = match_vma(
    scores, cores, directions, factor
  )
  options = dict(
    num_selected=config.num_selected, num_slots=config.num_slots, salt=salt
  )
  if kernel.unsupported_reason(scores, cores, directions, factor, **options):
    return None
  return kernel.retrieve(scores, cores, directions, factor, **options)


def _in_window(slot, first_row, num_rows):
  """Rows of the window that begins at first_row and goes around the end."""
  # Not a sum and a remainder: the sum of two int32 rows may not fit.
  is_beyond = slot >= num_rows - first_row
  return jnp.where(is_beyond, slot - (num_rows - first_row), slot + first_row)


def _by_key_set(
  scores: Float[Array, 'T P Q r'], expansion: int
) -> Float[Array, 'T P Q gr']:
  """Rank scores that are zero outside their own of g = sqrt(E) key sets.

  Cores of their own for all pairings of a row and a column key set are then the
  blocks of one core of rank g * r, and TDQKR needs no other form for them.
  """
  num_sets = math.isqrt(expansion)
  num_keys, num_ranks = scores.shape[2:]
  is_own = jnp.repeat(jnp.eye(num_sets), num_keys // num_sets, axis=0)
  own = scores[..., None, :] * is_own[None, None, :, :, None].astype(
    scores.dtype
  )
  return own.reshape(*scores.shape[:3], num_sets * num_ranks)


def _activate(scores, activation):
  """Weights of the kept cells [T, P, k, c]."""
  if activation == 'softmax':
    return jax.nn.softmax(scores, axis=2)
  if activation == 'sigmoid':
    return jax.nn.sigmoid(scores)
  return jax.nn.relu(scores) if activation == 'relu' else scores
