"""Sparse attention from a cache for sequences that are not equally long.

Padding before a sequence's first token takes no rows of the cache: it would
shift the grid of blocks, and each sequence is to be read as it is alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops.sparse_attention.block_router import Router
from jaxsparse.ops.sparse_attention.sparse_cache import (
  SparseCache,
  cached_sparse_attention,
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


def each_from_its_first_token(
  *arrays: Any, router: Router, **how: Any
) -> tuple[Float[Array, 'B T N H'], SparseCache, dict[str, jax.Array]]:
  """`cached_sparse_attention` of sequences that are not equally long.

  Args:
    *arrays: its inputs, the last of which are the number of rows of each
      sequence and how many of the new ones are padding before it.
    router: of the tokens.
    **how: its options.
  """
  *inputs, cache, (lengths, skipped) = arrays
  length = inputs[0].shape[1]
  sequences = (tuple(inputs), router)

  def moved(x, by):
    order = (jnp.arange(length)[None] + by[:, None]) % length
    return jax.vmap(lambda x, order: x[order])(x, order)

  if length > 1:
    # To the end, where the rows of the next tokens will be.
    sequences = jax.tree.map(lambda x: moved(x, skipped), sequences)

  def run(sequences, cache, index, count):
    inputs, router = sequences
    return cached_sparse_attention(
      *inputs, cache, index, count, router=router, **how
    )

  def one(sequences, cache, index, count):
    arrays = jax.tree.map(lambda x: x[None], (sequences, cache))
    return jax.tree.map(lambda x: x[0], run(*arrays, index, count))

  rows = (lengths, length - skipped)
  if len(lengths) == 1:
    # XLA's CPU copies a cache of one sequence that is written by a scatter.
    y, cache, stats = run(sequences, cache, *(x[0] for x in rows))
  else:
    y, cache, stats = jax.vmap(one)(sequences, cache, *rows)
  return (moved(y, -skipped) if length > 1 else y), cache, stats
