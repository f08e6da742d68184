# SPDX-License-Identifier: Apache-2.0
"""Histories of bounded size of sequences that move by themselves.

One token for each sequence never forgets: under `vmap` a condition becomes a
choice, and every sequence's cache would be moved at every token. Whoever knows
the lengths calls `forget` for a sequence that begins a block on a full cache.

Letters as in `block_selection`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops import chunking
from jaxsparse.ops.sparse_attention.bounded_history import (
  BoundedCache,
  advance,
  forget_one,
  in_blocks,
)
from jaxsparse.ops.sparse_attention.sparse_attention import tiles_in_order
from jaxsparse.ops.sparse_attention.sparse_inputs import (
  SparseInputs,
  SparseOptions,
)
from jaxsparse.ops.sparse_attention.tile_attention import RopeFn


def attention(
  inputs: SparseInputs,
  cache: BoundedCache,
  index: Int[Array, ' B'],
  count: Int[Array, ' B'],
  options: SparseOptions,
  rotate: RopeFn,
) -> tuple[Float[Array, 'B T N H'], BoundedCache, dict[str, jax.Array]]:
  """`bounded_attention` of T new rows, each sequence's at its own index.

  Args:
    inputs: queries and keys not rotated.
    cache: of all tokens before these. For one row there is room, see `forget`.
    index: tokens of each sequence before; a multiple of the block unless T is
      1.
    count: how many of the new rows are tokens; padding follows them.
    options: sizes, bounds, and what is read.
    rotate: as there.
  """
  inputs = inputs.completed()

  def one(
    inputs: SparseInputs,
    cache: BoundedCache,
    index: Int[Array, ''],
    count: Int[Array, ''],
  ):
    arrays = jax.tree.map(lambda x: x[None], (inputs, cache))
    found = _of_one(*arrays, index, count, options, rotate)
    return jax.tree.map(lambda x: x[0], found)

  if len(index) == 1:
    return _of_one(inputs, cache, index[0], count[0], options, rotate)
  return jax.vmap(one)(inputs, cache, index, count)


def _of_one(inputs, cache, index, count, options, rotate):
  length = inputs.query.shape[1]
  if length == 1:
    is_token = count > 0
    return advance(cache, index, inputs, 0, options, rotate, is_token)

  def one_block(cache: BoundedCache, block: tuple[jax.Array, SparseInputs]):
    i, new = block
    begin = i * options.block

    def run(cache: BoundedCache):
      cache = forget(cache, index + begin, options)
      last_row = jnp.minimum(count - 1 - begin, options.block - 1)
      y, cache, stats = advance(
        cache, index + begin, new, last_row, options, rotate
      )
      return cache, (y, stats)

    def skip(cache: BoundedCache):
      nothing = jax.eval_shape(run, cache)[1]
      zeros = jax.tree.map(
        lambda x: chunking.zeros(x.shape, x.dtype, new.query), nothing
      )
      return cache, zeros

    return jax.lax.cond(begin < count, run, skip, cache)

  blocks = in_blocks(inputs, options.block)
  numbers = jnp.arange(len(blocks.query))
  cache, (y, stats) = jax.lax.scan(one_block, cache, (numbers, blocks))
  y = jnp.moveaxis(y, 0, 1)
  y = y.reshape(y.shape[0], -1, *y.shape[3:])
  stats = tiles_in_order(stats, -(-length // options.tile))
  return y[:, :length], cache, stats


def forget(
  cache: BoundedCache, index: Int[Array, ''], options: SparseOptions
) -> BoundedCache:
  """Forgets a block if the row `index` begins one and the last place is taken.

  A second call changes nothing.
  """
  is_due = (index % options.block == 0) & (index >= cache.num_rows)
  is_taken = (cache.pages.segments[:, -options.block :] > 0).any()
  return jax.lax.cond(
    is_due & is_taken,
    lambda cache: forget_one(cache, options=options),
    lambda cache: cache,
    cache,
  )


def needs_room(length: int, num_rows: int, block: int) -> bool:
  """Whether `forget` is due before the token after `length` of them."""
  return length >= num_rows and length % block == 0
