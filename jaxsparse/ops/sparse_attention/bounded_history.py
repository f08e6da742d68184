"""Sparse attention over a history of bounded size: input without an end.

A full cache forgets the least wanted block before each new one. It holds the
sinks, `history` older blocks and the window, in the order of time; whatever
follows a forgotten block moves one place forward, and rows are positions, so
that no distance outgrows the cache (StreamingLLM, arXiv:2309.17453, numbers
positions so; InfLLM, arXiv:2402.04617, keeps blocks by what they were worth).
Keys are kept unrotated and turned by their rows when they are read. Summaries
are of keys turned by their rows in the block, and are turned by the block's
first row: rotations add up.

A block's worth is the mean, weighted to recent tiles, of its importance since
it was eligible. Whoever has not been eligible yet can't be forgotten. Blocks
that are leave their summaries, of which neighbours merge when they are many.

Letters as in `block_selection`; Z blocks of the cache, R summaries of forgotten
ones.
"""

import functools
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
  join_summaries,
)
from jaxsparse.ops.sparse_attention.sparse_attention import tiles_in_order
from jaxsparse.ops.sparse_attention.sparse_cache import (
  SparseCache,
  append,
  init_sparse_cache,
)
from jaxsparse.ops.sparse_attention.tile_attention import (
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
  # Of forgotten blocks, the newest last; a count of 0 is no block.
  forgotten: Summaries

  @property
  def num_rows(self) -> int:
    return self.pages.key.shape[2]


def init_bounded_cache(
  batch: int,
  num_kv_heads: int,
  width: int,
  grid: Grid,
  history: int,
  num_summaries: int,
  dtype: jax.typing.DTypeLike = jnp.float32,
  router_width: int = 0,
) -> BoundedCache:
  """An empty cache of `sinks + history + window + 1` blocks."""
  num_blocks = grid.sinks + history + grid.window_blocks + 1
  pages = init_sparse_cache(
    batch,
    num_kv_heads,
    num_blocks * grid.block,
    width,
    grid,
    dtype,
    router_width,
  )
  f32 = pages.summary_key.dtype

  def means():
    return jnp.zeros((batch, num_kv_heads, num_summaries, width), f32)

  def numbers(size):
    return jnp.zeros((batch, size), jnp.int32)

  return BoundedCache(
    pages,
    jnp.zeros((batch, num_blocks), f32),
    numbers(num_blocks),
    Summaries(means(), means(), numbers(num_summaries), numbers(num_summaries)),
  )


def bounded_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B T K H'],
  value: Float[Array, 'B T K H'],
  segments: Int[Array, 'B T'],
  coverage: Float[Array, 'B T K'],
  gates: Float[Array, 'B T N 3'],
  cache: BoundedCache,
  index: Int[Array, ''],
  *,
  grid: Grid,
  turn: Turn,
  pooling: Pooling | None = None,
  router: Router | None = None,
  summary_turn: Turn | None = None,
  use_summaries: bool = True,
  combine: str = 'merged',
) -> tuple[Float[Array, 'B T N H'], BoundedCache, dict[str, jax.Array]]:
  """T new tokens; how they are divided into calls changes nothing.

  Args:
    query: N heads, not rotated, as the keys.
    key: K heads.
    value: as `key`.
    segments: document of each token; 0 for padding.
    coverage: share of importance that is to be covered.
    gates: factors of the window, the kept blocks and the summaries.
    cache: of all tokens before these.
    index: their number; a multiple of the block unless T is 1.
    grid: blocks, tiles and bounds.
    turn: rotates heads [..., H] by rows that are broadcast over [...].
    pooling: weighs the rows in a block's summary.
    router: of the tokens; chooses the blocks instead of `query`.
    summary_turn: rotates the keys to the middle of a block that is summarized.
    use_summaries: read them, and not only choose by them.
    combine: 'merged' or 'gated'.

  Returns:
    Sums of the values, the cache, and the figures of `sparse_attention`.
  """
  how = dict(
    grid=grid,
    turn=turn,
    use_summaries=use_summaries,
    combine=combine,
    of_summaries=(pooling, summary_turn),
  )
  batch, length = query.shape[:2]
  if router is None:
    router = no_router(batch, length, length)
  new = (query, key, value, segments, coverage, gates, router)
  if length == 1:
    return _advance(cache, index, *new, last_row=0, **how)
  # Whole blocks; rows of padding are written over by those that come next.
  num_blocks = -(-length // grid.block)
  missing = num_blocks * grid.block - length

  def in_blocks(x):
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], num_blocks, grid.block, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def one_block(cache, block):
    i, new = block
    # The choice to go on with is that of the last row that is a token.
    last_row = jnp.minimum(length - 1 - i * grid.block, grid.block - 1)
    y, cache, stats = _advance(
      cache, index + i * grid.block, *new, last_row=last_row, **how
    )
    return cache, (y, stats)

  cache, (y, stats) = jax.lax.scan(
    one_block, cache, (jnp.arange(num_blocks), jax.tree.map(in_blocks, new))
  )
  y = jnp.moveaxis(y, 0, 1).reshape(query.shape[0], -1, *query.shape[2:])
  stats = tiles_in_order(stats, -(-length // grid.tile))
  return y[:, :length], cache, stats


def _advance(
  cache,
  index,
  query,
  key,
  value,
  segments,
  coverage,
  gates,
  router,
  *,
  grid,
  turn,
  use_summaries,
  combine,
  of_summaries,
  last_row,
):
  """One row, or the rows of a whole block."""
  batch, length, num_heads, width = query.shape
  heads = (key.shape[2], num_heads // key.shape[2])
  # A full cache takes every block in its last place.
  is_first_row = index % grid.block == 0
  row = jnp.minimum(index, cache.num_rows - grid.block + index % grid.block)
  cache = jax.lax.cond(
    is_first_row & (index >= cache.num_rows),
    functools.partial(_forget_one, grid=grid),
    lambda cache: cache,
    cache,
  )
  pages = append(
    cache.pages,
    row,
    key,
    value,
    segments,
    router.key,
    grid,
    *of_summaries,
    turn,
  )
  summaries = _placed(pages.summaries, grid, turn)
  rows = row + jnp.arange(length)
  query = turn(query, rows[None, :, None])
  tile = min(grid.tile, length)
  num_tiles = length // tile

  def tiled(x, *tail):
    return x.reshape(batch, num_tiles, tile, *tail)

  first_row = row + tile * jnp.arange(num_tiles)
  on_grid = pages.pages(grid.block)
  lead = lead_segments(on_grid.segments, first_row - first_row % grid.tile)
  query = tiled(query, *heads, width)
  new, is_eligible, shares = choose(
    query[:, :, 0],
    tiled(coverage, heads[0])[:, :, 0],
    first_row,
    lead,
    summaries,
    grid,
    Router(
      router.query[:, ::tile],
      router.weight[:, ::tile],
      pages.summary_router_key,
    ),
  )
  if length == 1:
    # A tile keeps the choice of its first row, whichever call that came in.
    begins = index % grid.tile == 0
    block = jnp.where(begins, new.block, pages.kept_block[:, :, None])
    is_kept = jnp.where(begins, new.is_kept, pages.is_kept[:, :, None])
    new = Selection(block, is_kept.astype(new.weight.dtype), is_kept)
    num_seen = begins.astype(jnp.int32)
  else:
    num_seen = last_row // grid.tile + 1
  y, of_sets, _ = attend_tiles(
    query,
    tiled(gates, *heads, 3),
    first_row,
    tiled(segments),
    on_grid,
    summaries if use_summaries else None,
    new,
    grid,
    combine,
    turn,
    _forgotten(cache.forgotten, grid, turn),
  )
  cache = _rated(cache, shares.mean(1), is_eligible, num_seen)
  kept_block, is_kept = (
    jax.lax.dynamic_index_in_dim(x, last_row // grid.tile, 2, keepdims=False)
    for x in (new.block, new.is_kept)
  )
  stats = dict(
    kept=new.weight.sum(-1),
    eligible=jnp.broadcast_to(
      is_eligible.sum(-1)[:, None], new.weight.shape[:3]
    ),
    shares=mean_of_rows(of_sets, tiled(segments)),
  )
  pages = pages._replace(kept_block=kept_block, is_kept=is_kept)
  y = y.reshape(batch, length, num_heads, width).astype(value.dtype)
  return y, cache._replace(pages=pages), stats


def _placed(summaries: Summaries, grid: Grid, turn: Turn) -> Summaries:
  """Summaries whose keys are turned by the first rows of their blocks."""
  first_row = jnp.arange(summaries.key.shape[2]) * grid.block
  return summaries._replace(key=turn(summaries.key, first_row[None, None]))


def _forgotten(
  summaries: Summaries, grid: Grid, turn: Turn
) -> Summaries | None:
  """They stand where the oldest block after the sinks is."""
  if not summaries.count.shape[1]:
    return None
  row = jnp.full((1, 1, 1), grid.sinks * grid.block)
  return summaries._replace(key=turn(summaries.key, row))


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


def _forget_one(cache: BoundedCache, *, grid: Grid) -> BoundedCache:
  """Takes out a block, such that the last place is free."""
  num_blocks = cache.seen.shape[1]
  place = jnp.arange(num_blocks)[None]
  # Not the window's, nor what has not been eligible yet.
  may_go = (place >= grid.sinks) & (place < num_blocks - grid.window_blocks - 1)
  weight = 1 - DECAY ** jnp.maximum(cache.seen, 1).astype(cache.worth.dtype)
  worth = jnp.where(may_go, cache.worth / weight, jnp.inf)
  # Of equals the oldest.
  gone = jnp.argmin(worth, axis=1)
  source = jnp.minimum(place + (place >= gone[:, None]), num_blocks - 1)
  is_new = place == num_blocks - 1

  def moved(x, axis):
    """`axis` of x holds the blocks, those of each sequence for themselves."""
    take = jax.vmap(functools.partial(jnp.take, axis=axis - 1, mode='clip'))
    return take(x, source)

  def emptied(x):
    return jnp.where(is_new, jnp.zeros((), x.dtype), moved(x, 1))

  pages = cache.pages
  on_grid = pages.pages(grid.block)
  forgotten = _remember(
    cache.forgotten,
    Summaries(
      *(
        jax.vmap(functools.partial(jnp.take, axis=axis - 1, mode='clip'))(
          x, gone[:, None]
        )
        for x, axis in zip(pages.summaries, (2, 2, 1, 1), strict=True)
      )
    ),
  )
  pages = pages._replace(
    key=moved(on_grid.key, 2).reshape(pages.key.shape),
    value=moved(on_grid.value, 2).reshape(pages.value.shape),
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
  return BoundedCache(
    pages, emptied(cache.worth), emptied(cache.seen), forgotten
  )


def _remember(old: Summaries, new: Summaries) -> Summaries:
  """Adds one summary; the two oldest become one, their rows' mean.

  An empty one is of no rows, so that merging begins when all are in use. Of two
  documents the newer one stays, as nothing reads the older again.
  """
  if not old.count.shape[1]:
    return old
  both = join_summaries(old, new)
  is_same = both.segment[:, 0] == both.segment[:, 1]
  first = jnp.where(is_same, both.count[:, 0], 0)
  total = first + both.count[:, 1]
  share = (first / jnp.maximum(total, 1)).astype(both.key.dtype)[:, None, None]

  def merged(x):
    return (
      x[:, :, 1:].at[:, :, 0].set(share * x[:, :, 0] + (1 - share) * x[:, :, 1])
    )

  return Summaries(
    merged(both.key),
    merged(both.value),
    both.count[:, 1:].at[:, 0].set(total),
    both.segment[:, 1:],
  )
