"""Sparse attention that goes on from a cache: the same numbers, token by token.

A cache holds keys and values on the grid of blocks, the blocks' summaries, and
the blocks that the last tile keeps. A tile's choice is made at its first row
and serves the tile's other rows when they come, in the same call or in later
ones, so that no partition of a sequence into calls changes a number.

Letters as in `block_selection`; S = Z b rows of the cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.ops.sparse_attention.block_router import Router, no_router
from jaxsparse.ops.sparse_attention.block_selection import (
  Grid,
  Selection,
  choose,
  lead_segments,
)
from jaxsparse.ops.sparse_attention.block_summaries import (
  Pooling,
  Summaries,
  Turn,
  mean_of_blocks,
  summarize,
)
from jaxsparse.ops.sparse_attention.sparse_attention import sparse_attention
from jaxsparse.ops.sparse_attention.tile_attention import (
  Pages,
  attend_tiles,
  mean_of_rows,
)


class SparseCache(NamedTuple):
  """What a layer keeps of earlier tokens."""

  key: Float[Array, 'B K S H']
  value: Float[Array, 'B K S H']
  segments: Int[Array, 'B S']
  summary_key: Float[Array, 'B K Z H']
  summary_value: Float[Array, 'B K Z H']
  summary_count: Int[Array, 'B Z']
  summary_segment: Int[Array, 'B Z']
  # Keys of the router, of width 0 without one, and their means.
  router_key: Float[Array, 'B S I']
  summary_router_key: Float[Array, 'B Z I']
  kept_block: Int[Array, 'B K k']
  is_kept: Bool[Array, 'B K k']

  @property
  def summaries(self) -> Summaries:
    return Summaries(
      self.summary_key,
      self.summary_value,
      self.summary_count,
      self.summary_segment,
    )

  def pages(self, block: int) -> Pages:
    def paged(x, axis):
      return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])

    return Pages(
      paged(self.key, 2), paged(self.value, 2), paged(self.segments, 1)
    )


def init_sparse_cache(
  batch: int,
  num_kv_heads: int,
  length: int,
  width: int,
  grid: Grid,
  dtype: jax.typing.DTypeLike = jnp.float32,
  router_width: int = 0,
) -> SparseCache:
  """An empty cache for at least `length` rows."""
  num_blocks = -(-length // grid.block)
  slots = min(grid.slots, num_blocks)
  f32 = jnp.promote_types(dtype, jnp.float32)

  def rows():
    shape = (batch, num_kv_heads, num_blocks * grid.block, width)
    return jnp.zeros(shape, dtype)

  def means():
    return jnp.zeros((batch, num_kv_heads, num_blocks, width), f32)

  def numbers(*shape):
    return jnp.zeros((batch, *shape), jnp.int32)

  return SparseCache(
    rows(), rows(), numbers(num_blocks * grid.block),
    means(), means(), numbers(num_blocks), numbers(num_blocks),
    jnp.zeros((batch, num_blocks * grid.block, router_width), f32),
    jnp.zeros((batch, num_blocks, router_width), f32),
    numbers(num_kv_heads, slots), numbers(num_kv_heads, slots) > 0,
  )  # fmt: skip


def append(
  cache: SparseCache,
  index: Int[Array, ''],
  key: Float[Array, 'B T K H'],
  value: Float[Array, 'B T K H'],
  segments: Int[Array, 'B T'],
  router_key: Float[Array, 'B T I'],
  grid: Grid,
  pooling: Pooling | None = None,
  summary_turn: Turn | None = None,
  turn: Turn | None = None,
) -> SparseCache:
  """Writes rows at `index`, and the summaries of the blocks they touch.

  With `turn`, keys are not rotated yet, and summaries are of keys that are by
  their rows in the block. `pooling` and `summary_turn` as in `summarize`.
  """

  def write(old, new, start, axis):
    return jax.lax.dynamic_update_slice_in_dim(
      old, new.astype(old.dtype), start, axis
    )

  rows = [write(cache.segments, segments, index, 1)]
  for old, new in ((cache.value, value), (cache.key, key)):
    rows.insert(0, write(old, jnp.moveaxis(new, 1, 2), index, 2))
  cache = cache._replace(
    **dict(zip(('key', 'value', 'segments'), rows, strict=True)),
    router_key=write(cache.router_key, router_key, index, 1),
  )
  pages, num_blocks = cache.pages(grid.block), cache.summary_count.shape[1]
  length = key.shape[1]
  # As many blocks as T rows can touch, wherever they begin.
  touched = min(num_blocks, (length + 2 * grid.block - 2) // grid.block)
  first = jnp.minimum(index // grid.block, num_blocks - touched)
  near = Pages(
    *(
      jax.lax.dynamic_slice_in_dim(x, first, touched, axis)
      for x, axis in zip(pages, (2, 2, 1), strict=True)
    )
  )
  if turn is not None:
    offset = jnp.arange(grid.block)[None, None, None]
    near = near._replace(key=turn(near.key, offset))
  new = summarize(*near, pooling, summary_turn)
  summaries = Summaries(
    *(
      write(old, some, first, axis)
      for old, some, axis in zip(
        cache.summaries, new, (2, 2, 1, 1), strict=True
      )
    )
  )
  rows = jax.lax.dynamic_slice_in_dim(
    cache.router_key, first * grid.block, touched * grid.block, 1
  )
  router_means = mean_of_blocks(rows, near.segments)
  return cache._replace(
    **{f'summary_{n}': x for n, x in summaries._asdict().items()},
    summary_router_key=write(cache.summary_router_key, router_means, first, 1),
  )


def cached_sparse_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T K H'],
  value: Float[Array, 'B T K H'],
  segments: Int[Array, 'B T'],
  coverage: Float[Array, 'B T K'],
  gates: Float[Array, 'B T N 3'],
  cache: SparseCache,
  index: Int[Array, ''],
  count: Int[Array, ''] | None = None,
  *,
  grid: Grid,
  pooling: Pooling | None = None,
  router: Router | None = None,
  summary_turn: Turn | None = None,
  use_summaries: bool = True,
  combine: str = 'merged',
  chunk: int = 512,
) -> tuple[Float[Array, 'B T N H'], SparseCache, dict[str, jax.Array]]:
  """T new tokens, whose rows begin at `index`; the cache must have room.

  See `sparse_attention`. One token reads its window, the slots of kept blocks
  and the summaries, whatever the length of the cache. Of several only the first
  `count` stay, if it is given: what comes next is written over the others.
  """
  batch, length = query.shape[:2]
  if router is None:
    router = no_router(batch, length, length)
  cache = append(
    cache, index, key, value, segments, router.key, grid, pooling, summary_turn
  )
  how = dict(grid=grid, use_summaries=use_summaries, combine=combine)
  if length == 1:
    y, cache, stats = _one_token(
      query, segments, coverage, gates, cache, index, router, **how
    )
    return y, cache, stats
  # Rows of tiles begin on the grid: rows before the first are padding here.
  before = index % grid.block
  shift = grid.block - 1

  def placed(x):
    shape = (x.shape[0], shift + length, *x.shape[2:])
    return jax.lax.dynamic_update_slice_in_dim(
      jnp.zeros(shape, x.dtype), x, before, 1
    )

  earlier = Selection(
    cache.kept_block,
    cache.is_kept.astype(cache.summary_key.dtype),
    cache.is_kept,
  )
  y, stats = sparse_attention(
    placed(query),
    jnp.moveaxis(cache.key, 2, 1),
    jnp.moveaxis(cache.value, 2, 1),
    placed(segments),
    cache.segments,
    placed(coverage),
    placed(gates),
    first_row=index - before,
    earlier=(earlier, index),
    router=Router(
      placed(router.query), placed(router.weight), cache.router_key
    ),
    pooling=pooling,
    summary_turn=summary_turn,
    chunk=chunk,
    **how,
  )
  y = jax.lax.dynamic_slice_in_dim(y, before, length, 1)
  last = (before + (length if count is None else count) - 1) // grid.tile
  kept_block, is_kept = (
    jax.lax.dynamic_index_in_dim(stats[name], last, 2, keepdims=False)
    for name in ('block', 'is_kept')
  )
  return y, cache._replace(kept_block=kept_block, is_kept=is_kept), stats


def _one_token(
  query, segments, coverage, gates, cache, index, router, *, grid, **how
):
  batch, _, num_heads, width = query.shape
  num_kv_heads = cache.key.shape[1]
  heads = (num_kv_heads, num_heads // num_kv_heads)
  query = query.reshape(batch, 1, 1, *heads, width)
  pages, first_row = cache.pages(grid.block), index - index % grid.tile
  lead = lead_segments(pages.segments, first_row[None])
  new, is_eligible, _ = choose(
    query[:, :, 0],
    coverage,
    index[None],
    lead,
    cache.summaries,
    grid,
    router._replace(key=cache.summary_router_key),
  )
  is_first = index % grid.tile == 0
  block = jnp.where(is_first, new.block[:, :, 0], cache.kept_block)
  is_kept = jnp.where(is_first, new.is_kept[:, :, 0], cache.is_kept)
  selection = Selection(
    block[:, :, None],
    is_kept.astype(new.weight.dtype)[:, :, None],
    is_kept[:, :, None],
  )
  y, shares, _ = attend_tiles(
    query,
    gates.reshape(batch, 1, 1, *heads, 3),
    index[None],
    segments[:, None],
    pages,
    cache.summaries if how['use_summaries'] else None,
    selection,
    grid,
    how['combine'],
  )
  stats = dict(
    kept=selection.weight.sum(-1),
    eligible=jnp.broadcast_to(
      is_eligible.sum(-1)[:, None], (batch, num_kv_heads, 1)
    ),
    shares=mean_of_rows(shares, segments[:, None]),
  )
  y = y.reshape(batch, 1, num_heads, width).astype(query.dtype)
  return y, cache._replace(kept_block=block, is_kept=is_kept), stats
