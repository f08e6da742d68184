# SPDX-License-Identifier: Apache-2.0
"""Scores of a memory layer's keys: their norms, and products with queries.

Letters: T tokens, q query width, w key width, Q logical keys per axis, P heads,
r ranks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsparse import mesh
from jaxsparse.config import MemoryConfig
from jaxsparse.ops import cpu
from jaxsparse.ops.memory.folded_keys import FoldedKeys
from jaxsparse.ops.memory.tucker import leading_directions

_NORM_EPSILON = 1e-5


def norm(
  x: Float[Array, '*S'], scale: Float[Array, 'q'] | None, axis: int, kind: str
) -> Float[Array, '*S']:
  """RMSNorm or LayerNorm without a bias along `axis`, in f32 at least.

  Args:
    x: queries or keys.
    scale: gain; None with 'none', and where it is elsewhere.
    axis: that of the width.
    kind: 'rms', 'layer', or 'none' for `x` as it is.
  """
  if kind == 'none':
    return x
  x = _wide(x)
  if kind == 'layer':
    x -= jnp.mean(x, axis=axis, keepdims=True)
  square = jnp.mean(x * x, axis=axis, keepdims=True)
  x *= jax.lax.rsqrt(square + _NORM_EPSILON)
  if scale is None:
    return x
  shape = [1] * x.ndim
  shape[axis] = -1
  return x * scale.reshape(shape)


def folded(
  keys: Float[Array, 'P 2 Q w r'],
  key_gain: Float[Array, 'w'] | None,
  query_gain: Float[Array, 'q'] | None,
  cores: Float[Array, 'c P s s'] | None,
  config: MemoryConfig,
) -> FoldedKeys:
  """The layer's keys once and for all; gains are None with norms of 'none'."""
  numbers = norm(keys, key_gain, -2, config.key_norm)
  if query_gain is not None:
    # The same for all ranks, or a slice for each.
    gain = query_gain.reshape(-1, keys.shape[3]).T
    numbers *= gain[None, None, None]
  is_by_head = config.query == 'per_head'
  order = (1, 4, 0, 2, 3) if is_by_head else (1, 4, 3, 0, 2)
  matrix = numbers.transpose(order).astype(keys.dtype)
  directions = None if cores is None else leading_directions(cores.sum(0))
  return FoldedKeys(matrix, directions, is_by_head)


def rms_factor(query: Float[Array, 'T 2 q']) -> Float[Array, 'T 2']:
  """What the RMSNorm of `norm` multiplies a query with, but for its gain."""
  square = jnp.square(_wide(query)).mean(-1)
  return jax.lax.rsqrt(square + _NORM_EPSILON)


def _wide(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def of_ranks(
  query: Float[Array, 'T 2 ...'],
  keys: Float[Array, 'key_heads 2 Q w r'] | FoldedKeys,
  config: MemoryConfig,
) -> tuple[Float[Array, 'T P Q r'], ...]:
  """Inner products with all row keys, and with all column keys."""
  query = _wide(query)
  if isinstance(keys, FoldedKeys):
    scores = by_folded(query, keys, config)
    sides, num_parts = scores.shape[0], scores.shape[1] // keys.shape[-1]
    scores = scores.reshape(sides, -1, num_parts, *scores.shape[2:]).sum(2)
    return tuple(jnp.moveaxis(side, 0, -1) for side in scores)
  query = _by_rank(query, config)
  per_rank = 'r' if config.split_key_dim or config.query == 'per_rank' else ''
  per_head = 'p' if config.query == 'per_head' else ''
  shared = 'qkr' if config.share_keys else 'pqkr'
  dims = f't{per_head}{per_rank}k,{shared}->tpqr'

  def one_by_one(query, keys):
    keys = _wide(keys)
    sides = keys[0] if config.share_keys else jnp.moveaxis(keys, 1, 0)
    return tuple(cpu.product(dims, query[:, s], sides[s]) for s in (0, 1))

  if per_head or config.share_keys:
    return one_by_one(query, keys)
  return jax.lax.platform_dependent(
    query,
    keys,
    cuda=by_one_product,
    default=one_by_one,
  )


def by_folded(
  query: Float[Array, 'T 2 ...'], keys: FoldedKeys, config: MemoryConfig
) -> Float[Array, '2 r_parts T P Q']:
  """Scores of row keys and of column keys, rank by rank, in f32 at least.

  Where keys are of fewer bits than queries, a GPU makes each rank's in two
  parts, one after the other, which are yet to be added up.
  """
  query = _by_rank(query, config)
  if not (config.split_key_dim or config.query == 'per_rank'):
    # The same for all ranks, or the product would lay the keys out anew.
    query = jnp.broadcast_to(
      query[..., None, :],
      (*query.shape[:-1], keys.matrix.shape[1], query.shape[-1]),
    )
  per_head = 'p' if config.query == 'per_head' else ''
  matrix, of_keys = keys.matrix, 'srpqw' if keys.is_by_head else 'srwpq'
  if config.share_keys:
    matrix, of_keys = matrix[:, :, 0], of_keys.replace('p', '')
  wide = jnp.promote_types(query.dtype, jnp.float32)
  if mesh.platform() == 'gpu':
    parts = _parts(query, matrix.dtype)
  else:
    parts, matrix = [query.astype(wide)], matrix.astype(wide)
  scores = jnp.einsum(
    f'xts{per_head}rw,{of_keys}->srxtpq',
    jnp.stack(parts),
    matrix,
    preferred_element_type=wide,
  )
  return scores.reshape(2, -1, *scores.shape[3:])


def _parts(query, dtype):
  """Summands of a query in the keys' type, as exact as that allows."""
  if dtype.itemsize >= query.dtype.itemsize:
    return [query.astype(dtype)]
  bits = jnp.finfo(dtype)
  upper = jax.lax.reduce_precision(query, bits.nexp, bits.nmant)
  return [x.astype(dtype) for x in (upper, query - upper)]


def _by_rank(query, config):
  """[T, 2, ..., q] with ranks before q, where they have their own queries."""
  if config.split_key_dim:
    # Narrow keys meet slices of the query.
    query = query.reshape(*query.shape[:-1], config.num_ranks, -1)
  return query


def by_one_product(
  query: Float[Array, 'T 2 ... q'], keys: Float[Array, 'P 2 Q q r']
) -> tuple[Float[Array, 'T P Q r'], ...]:
  """Scores of row keys and of column keys, see `_rank_products`."""
  scores, num_ranks = _rank_products(query, keys), keys.shape[-1]
  if scores.shape[3] > num_ranks:
    scores = scores[..., :num_ranks, :] + scores[..., num_ranks:, :]
  return tuple(scores[:, s].transpose(1, 0, 3, 2) for s in range(2))


def _rank_products(
  query: Float[Array, 'T 2 ... q'], keys: Float[Array, 'P 2 Q q r']
) -> Float[Array, 'P 2 T parts_r Q']:
  """Each rank's query, zero at the other ranks, times the keys as they lie.

  That is r times the FLOPs of a product for each rank, for which a GPU would
  first cast all keys and sort them by rank, in decoding at every step. Keys of
  16 bits meet queries in two parts, whose scores are yet to be added up.
  """
  num_heads, _, num_keys, width, num_ranks = keys.shape
  if query.ndim == 3:
    query = query[:, :, None]
  is_own = jnp.eye(num_ranks, dtype=query.dtype)[None, None, :, None]
  own = (query[..., None] * is_own).reshape(len(query), 2, num_ranks, -1)
  own = jnp.concatenate(_parts(own, keys.dtype), axis=2)
  return jnp.einsum(
    'psqk,pstrk->pstrq',
    keys.reshape(num_heads, 2, num_keys, width * num_ranks),
    jnp.broadcast_to(
      own.transpose(1, 0, 2, 3)[None],
      (num_heads, 2, len(query), *own.shape[2:]),
    ),
    preferred_element_type=query.dtype,
  )
