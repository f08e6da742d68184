# SPDX-License-Identifier: Apache-2.0
"""Sparse attention over a history of bounded size: input without an end.

A full cache forgets the least wanted block before each new one. It holds the
sinks, `history` older blocks and the window, in the order of time; whatever
follows a forgotten block moves one place forward, and rows are positions: no
distance outgrows the cache (StreamingLLM, arXiv:2309.17453, numbers positions
so; InfLLM, arXiv:2402.04617, keeps blocks by their worth). Keys are kept
unrotated, quantized ones too, and rotated by their rows when they are read.
Summaries are of keys rotated by their rows in the block, and are rotated by the
block's first row: rotations add up.

A block's worth is the mean, weighted to recent tiles, of its importance since
it was eligible. A block that has not been eligible yet can't be forgotten.

Letters as in `block_selection`; Z blocks of the cache.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.ops.sparse_attention.block_router import Router
from jaxsparse.ops.sparse_attention.block_selection import (
  Selection,
  choose,
  lead_segments,
)
from jaxsparse.ops.sparse_attention.block_summaries import Summaries
from jaxsparse.ops.sparse_attention.sparse_attention import tiles_in_order
from jaxsparse.ops.sparse_attention.sparse_cache import (
  SparseCache,
  append,
  init_sparse_cache,
)
from jaxsparse.ops.sparse_attention.sparse_inputs import (
  SparseInputs,
  SparseOptions,
)
from jaxsparse.ops.sparse_attention.tile_attention import (
  RopeFn,
  attend_tiles,
  mean_of_rows,
)

# How much of a block's worth a tile leaves as it was.
DECAY = 0.9


class BoundedCache(NamedTuple):
  """What a layer keeps of all earlier tokens."""

  pages: SparseCache
  # Worth of each block times 1 - DECAY ** seen, and the tiles that saw it.
  worth: Float[Array, 'B Z']
  seen: Int[Array, 'B Z']

  @property
  def num_rows(self) -> int:
    return self.pages.segments.shape[1]


def init_bounded_cache(
  batch: int,
  num_kv_heads: int,
  width: int,
  options: SparseOptions,
  history: int,
  dtype: jax.typing.DTypeLike = jnp.float32,
  router_width: int = 0,
  is_quantized: bool = False,
) -> BoundedCache:
  """An empty cache of `sinks + history + window + 1` blocks."""
  num_blocks = options.sinks + history + options.window_blocks + 1
  pages = init_sparse_cache(
    batch,
    num_kv_heads,
    num_blocks * options.block,
    width,
    options,
    dtype,
    router_width,
    is_quantized,
  )
  return BoundedCache(
    pages,
    jnp.zeros((batch, num_blocks), pages.summary_key.dtype),
    jnp.zeros((batch, num_blocks), jnp.int32),
  )


def bounded_attention(
  inputs: SparseInputs,
  cache: BoundedCache,
  index: Int[Array, ''],
  options: SparseOptions,
  rotate: RopeFn,
) -> tuple[Float[Array, 'B T N H'], BoundedCache, dict[str, jax.Array]]:
  """T new tokens; how they are divided into calls changes nothing.

  Args:
    inputs: queries and keys not rotated.
    cache: of all tokens before these.
    index: their number; a multiple of the block unless T is 1.
    options: sizes, bounds, and what is read.
    rotate: rotates heads [..., H] by rows that are broadcast over [...].

  Returns:
    Sums of the values, the cache, and the figures of `sparse_attention`.
  """
  inputs = inputs.completed()
  batch, length, *heads = inputs.query.shape
  if length == 1:
    cache = make_room(cache, index, options)
    return advance(cache, index, inputs, 0, options, rotate)
  # Whole blocks; rows of padding are written over by those that come next.
  blocks = in_blocks(inputs, options.block)

  def one_block(cache: BoundedCache, block: tuple[jax.Array, SparseInputs]):
    i, new = block
    # The choice to go on with is that of the last row that is a token.
    last_row = jnp.minimum(length - 1 - i * options.block, options.block - 1)
    begin = index + i * options.block
    cache = make_room(cache, begin, options)
    y, cache, stats = advance(cache, begin, new, last_row, options, rotate)
    return cache, (y, stats)

  numbers = jnp.arange(len(blocks.query))
  cache, (y, stats) = jax.lax.scan(one_block, cache, (numbers, blocks))
  y = jnp.moveaxis(y, 0, 1).reshape(batch, -1, *heads)
  stats = tiles_in_order(stats, -(-length // options.tile))
  return y[:, :length], cache, stats


def in_blocks(inputs: SparseInputs, block: int) -> SparseInputs:
  """Each array's rows [B, T, ...] as [blocks, B, block, ...], padded with 0."""

  def cut(x: jax.Array):
    batch, length = x.shape[:2]
    num_blocks = -(-length // block)
    missing = num_blocks * block - length
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(batch, num_blocks, block, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  return jax.tree.map(cut, inputs)


def make_room(
  cache: BoundedCache, index: Int[Array, ''], options: SparseOptions
) -> BoundedCache:
  """Forgets a block if the row `index` begins one and the cache is full."""
  is_full = (index % options.block == 0) & (index >= cache.num_rows)
  return jax.lax.cond(
    is_full,
    functools.partial(forget_one, options=options),
    lambda cache: cache,
    cache,
  )


def advance(
  cache: BoundedCache,
  index: Int[Array, ''],
  inputs: SparseInputs,
  last_row: Int[Array, ''] | int,
  options: SparseOptions,
  rotate: RopeFn,
  is_token: Bool[Array, ''] | bool = True,
) -> tuple[Float[Array, 'B T N H'], BoundedCache, dict[str, jax.Array]]:
  """One row, or the rows of a whole block, for which there is room.

  Args:
    cache: of all tokens before these.
    index: their number.
    inputs: of the rows.
    last_row: the last of them that is a token.
    options: as in `bounded_attention`.
    rotate: as there.
    is_token: whether any is; one row of padding is written over by the next
      one, and no block's worth changes.
  """
  batch, length, num_heads, width = inputs.query.shape
  num_kv_heads = inputs.key.shape[2]
  heads = (num_kv_heads, num_heads // num_kv_heads)
  # A full cache takes every block in its last place.
  at = index % options.block
  row = jnp.minimum(index, cache.num_rows - options.block + at)
  pages = append(cache.pages, row, inputs, options, rotate)
  summaries = _placed(pages.summaries, options, rotate)
  rows = row + jnp.arange(length)
  query = rotate(inputs.query, rows[None, :, None])
  tile = min(options.tile, length)
  num_tiles = length // tile

  def tiled(x: jax.Array, *tail: int):
    return x.reshape(batch, num_tiles, tile, *tail)

  first_row = row + tile * jnp.arange(num_tiles)
  on_grid = pages.pages(options.block)
  lead = lead_segments(on_grid.segments, first_row - first_row % options.tile)
  query, segments = tiled(query, *heads, width), tiled(inputs.segments)
  new, is_eligible, shares = choose(
    query[:, :, 0],
    tiled(inputs.coverage, num_kv_heads)[:, :, 0],
    first_row,
    lead,
    summaries,
    options,
    Router(
      inputs.router.query[:, ::tile],
      inputs.router.weight[:, ::tile],
      pages.summary_router_key,
    ),
  )
  if length == 1:
    # A tile keeps the choice of its first row, whichever call that came in.
    begins = index % options.tile == 0
    block = jnp.where(begins, new.block, pages.kept_block[:, :, None])
    is_kept = jnp.where(begins, new.is_kept, pages.is_kept[:, :, None])
    new = Selection(block, is_kept.astype(new.weight.dtype), is_kept)
    num_seen = (begins & is_token).astype(jnp.int32)
  else:
    num_seen = last_row // options.tile + 1
  y, of_sets, _ = attend_tiles(
    query,
    tiled(inputs.gates, *heads, 3),
    first_row,
    segments,
    on_grid,
    summaries,
    new,
    options,
    rotate,
  )
  cache = _rated(cache, shares.mean(1), is_eligible, num_seen)
  kept_block, is_kept = (
    jax.lax.dynamic_index_in_dim(x, last_row // options.tile, 2, keepdims=False)
    for x in (new.block, new.is_kept)
  )
  stats = dict(
    kept=new.weight.sum(-1),
    eligible=jnp.broadcast_to(
      is_eligible.sum(-1)[:, None], new.weight.shape[:3]
    ),
    shares=mean_of_rows(of_sets, segments),
  )
  pages = pages._replace(kept_block=kept_block, is_kept=is_kept)
  y = y.reshape(batch, length, num_heads, width).astype(inputs.value.dtype)
  return y, cache._replace(pages=pages), stats


def _placed(
  summaries: Summaries, options: SparseOptions, rotate: RopeFn
) -> Summaries:
  """Summaries whose keys are rotated by the first rows of their blocks."""
  first_row = jnp.arange(summaries.key.shape[2]) * options.block
  return summaries._replace(key=rotate(summaries.key, first_row[None, None]))


def _rated(
  cache: BoundedCache,
  shares: Float[Array, 'B n Z'],
  is_eligible: Bool[Array, 'B n Z'],
  num_seen: Int[Array, ''],
) -> BoundedCache:
  """The blocks' worth after the first `num_seen` of the tiles."""
  worth, seen = cache.worth, cache.seen
  for i in range(shares.shape[1]):
    counts = is_eligible[:, i] & (i < num_seen)
    new = DECAY * worth + (1 - DECAY) * shares[:, i].astype(worth.dtype)
    worth = jnp.where(counts, new, worth)
    seen = seen + counts
  return cache._replace(worth=worth, seen=seen)


def forget_one(cache: BoundedCache, *, options: SparseOptions) -> BoundedCache:
  """Takes out a key block, which frees the last place."""
  num_blocks = cache.seen.shape[1]
  place = jnp.arange(num_blocks)[None]
  # Not the window's, nor what has not been eligible yet.
  may_go = (place >= options.sinks) & (
    place < num_blocks - options.window_blocks - 1
  )
  weight = 1 - DECAY ** jnp.maximum(cache.seen, 1).astype(cache.worth.dtype)
  worth = jnp.where(may_go, cache.worth / weight, jnp.inf)
  # Of equals the oldest.
  gone = jnp.argmin(worth, axis=1)
  source = jnp.minimum(place + (place >= gone[:, None]), num_blocks - 1)
  is_new = place == num_blocks - 1

  def moved(x: jax.Array, axis: int):
    """`axis` of x holds the blocks, those of each sequence for themselves."""
    take = jax.vmap(functools.partial(jnp.take, axis=axis - 1, mode='clip'))
    return take(x, source)

  def emptied(x: jax.Array):
    return jnp.where(is_new, jnp.zeros((), x.dtype), moved(x, 1))

  pages = cache.pages
  on_grid = pages.pages(options.block)
  key, value = jax.tree.map(
    lambda x, old: moved(x, 2).reshape(old.shape),
    (on_grid.key, on_grid.value),
    (pages.key, pages.value),
  )
  pages = pages._replace(
    key=key,
    value=value,
    # Rows of the new block that are not written yet belong to no document.
    segments=jnp.where(
      is_new[..., None], 0, moved(on_grid.segments, 1)
    ).reshape(pages.segments.shape),
    router_key=moved(
      pages.router_key.reshape(
        *on_grid.segments.shape, pages.router_key.shape[-1]
      ),
      1,
    ).reshape(pages.router_key.shape),
    summary_router_key=moved(pages.summary_router_key, 1),
    summary_key=moved(pages.summary_key, 2),
    summary_value=moved(pages.summary_value, 2),
    summary_count=emptied(pages.summary_count),
    summary_segment=emptied(pages.summary_segment),
  )
  return BoundedCache(pages, emptied(cache.worth), emptied(cache.seen))
