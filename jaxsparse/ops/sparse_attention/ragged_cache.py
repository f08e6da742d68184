# SPDX-License-Identifier: Apache-2.0
"""Sparse attention from a cache for sequences that are not equally long.

Padding before a sequence's first token takes no rows of the cache: it would
shift the block layout, and each sequence is to be read as it is alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops.sparse_attention.sparse_cache import (
  SparseCache,
  cached_sparse_attention,
)
from jaxsparse.ops.sparse_attention.sparse_inputs import (
  SparseInputs,
  SparseOptions,
)


def num_skipped(
  segments: Int[Array, 'B T'], lengths: Int[Array, ' B']
) -> Int[Array, ' B']:
  """Tokens of padding before the first one of sequences that have no rows."""
  is_token = segments > 0
  before = jnp.where(
    is_token.any(1), jnp.argmax(is_token, axis=1), segments.shape[1]
  )
  return jnp.where(lengths == 0, before, 0).astype(jnp.int32)


def unpadded_cached_attention(
  inputs: SparseInputs,
  cache: SparseCache,
  lengths: Int[Array, ' B'],
  skipped: Int[Array, ' B'],
  count: Int[Array, ' B'],
  options: SparseOptions,
) -> tuple[Float[Array, 'B T N H'], SparseCache, dict[str, jax.Array]]:
  """`cached_sparse_attention` of sequences that are not equally long.

  Args:
    inputs: of T new rows of each sequence.
    cache: of all rows before.
    lengths: rows of each sequence in the cache.
    skipped: how many of the new rows are padding before a sequence's first
      token, see `num_skipped`.
    count: how many of those that follow stay: the others are padding.
    options: as there.
  """
  inputs = inputs.completed()
  length = inputs.query.shape[1]

  def moved(x: jax.Array, by: Int[Array, ' B']):
    order = (jnp.arange(length)[None] + by[:, None]) % length
    return jax.vmap(lambda x, order: x[order])(x, order)

  if length > 1:
    # To the end, where the rows of the next tokens will be.
    inputs = jax.tree.map(lambda x: moved(x, skipped), inputs)

  def one(
    inputs: SparseInputs,
    cache: SparseCache,
    index: Int[Array, ''],
    count: Int[Array, ''],
  ):
    arrays = jax.tree.map(lambda x: x[None], (inputs, cache))
    found = cached_sparse_attention(*arrays, index, options, count)
    return jax.tree.map(lambda x: x[0], found)

  if len(lengths) == 1:
    # XLA's CPU copies a cache of one sequence that is written by a scatter.
    y, cache, stats = cached_sparse_attention(
      inputs, cache, lengths[0], options, count[0]
    )
  else:
    y, cache, stats = jax.vmap(one)(inputs, cache, lengths, count)
  return (moved(y, -skipped) if length > 1 else y), cache, stats
