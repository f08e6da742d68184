"""Sparse attention of whole sequences: chunks of tiles that choose and attend.

`block_selection` says which blocks a tile keeps, `tile_attention` what it makes
of them; letters as there.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops.sparse_attention.block_router import (
  Router,
  no_router,
  router_loss,
)
from jaxsparse.ops.sparse_attention.block_selection import (
  Grid,
  Selection,
  choose,
  lead_segments,
)
from jaxsparse.ops.sparse_attention.block_summaries import (
  Pooling,
  Turn,
  mean_of_blocks,
  summarize,
)
from jaxsparse.ops.sparse_attention.tile_attention import (
  attend_tiles,
  mean_of_rows,
  to_pages,
)


def sparse_attention(
  query: Float[Array, 'B T N H'],
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K H'],
  query_segments: Int[Array, 'B T'],
  key_segments: Int[Array, 'B S'],
  coverage: Float[Array, 'B T K'],
  gates: Float[Array, 'B T N 3'] | None = None,
  *,
  grid: Grid,
  first_row: Int[Array, ''] | int = 0,
  earlier: tuple[Selection, Int[Array, '']] | None = None,
  pooling: Pooling | None = None,
  router: Router | None = None,
  summary_turn: Turn | None = None,
  use_summaries: bool = True,
  combine: str = 'merged',
  chunk: int = 512,
) -> tuple[Float[Array, 'B T N H'], dict[str, jax.Array]]:
  """Sparse attention of all queries, chunk by chunk.

  Memory grows with T and with S and not with their product: the backward pass
  makes each chunk again.

  Args:
    query: N heads, rotated; head n reads key/value head n // (N / K).
    key: K heads, rotated. Rows after the queries' may hold anything finite.
    value: as `key`.
    query_segments: document of each query; 0 for padding.
    key_segments: document of each key.
    coverage: share of importance that is to be covered; that of the first row
      of each tile counts.
    gates: factors of the window, the kept blocks and the summaries; 1 without.
    grid: blocks, tiles and bounds.
    first_row: of the queries among the keys' rows, a multiple of the block.
    earlier: the choice [B, K, k] of the first tile that has queries, and the
      row of the first of them, if other rows of that tile came before.
    pooling: weighs the rows in a block's summary.
    router: chooses the blocks; without one, or by one of width 0, `query` and
      the summaries do.
    summary_turn: rotates the keys to the middle of a block that is summarized.
    use_summaries: read them, and not only choose by them.
    combine: 'merged' or 'gated'.
    chunk: queries at once, at least.

  Returns:
    Sums of the values, and of each tile and key/value head: how many blocks are
    'kept' [B, K, n] (with the gradient of the coverage) and 'eligible', the
    'block' of each slot [B, K, n, k] and whether it 'is_kept', the 'shares'
    [B, K, n, 3] of the three sets, and [B, K, n] the 'entropy' of the blocks'
    importance in nats and the 'router_loss'.
  """
  batch, length, num_heads, width = query.shape
  num_kv_heads = key.shape[2]
  pages = to_pages(key, value, key_segments, grid.block)
  summaries = summarize(*pages, pooling, summary_turn)
  if router is None:
    router = no_router(batch, length, key.shape[1])
  missing_keys = pages.segments.size // batch - key.shape[1]
  router_key = mean_of_blocks(
    jnp.pad(router.key, [(0, 0), (0, missing_keys), (0, 0)]), pages.segments
  )
  per_chunk = max(1, chunk // grid.tile)
  num_chunks = -(-length // (per_chunk * grid.tile))
  missing = num_chunks * per_chunk * grid.tile - length
  group = num_heads // num_kv_heads
  if gates is None:
    gates = jnp.ones((batch, length, num_heads, 3), query.dtype)

  def tiled(x, *tail):
    """[chunks, B, tiles, rows, ...]."""
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    shape = (batch, num_chunks, per_chunk, grid.tile, *tail)
    return jnp.moveaxis(x.reshape(shape), 1, 0)

  tiles = dict(
    query=tiled(query, num_kv_heads, group, width),
    gates=tiled(gates, num_kv_heads, group, 3),
    coverage=tiled(coverage, num_kv_heads),
    segments=tiled(query_segments),
    router_query=tiled(router.query, *router.query.shape[2:]),
    router_weight=tiled(router.weight, router.weight.shape[2]),
    first_row=first_row
    + (jnp.arange(num_chunks * per_chunk) * grid.tile).reshape(
      num_chunks, per_chunk
    ),
  )

  def run(grid, tiles):
    selection, is_eligible, importance = choose(
      tiles['query'][:, :, 0],
      tiles['coverage'][:, :, 0],
      tiles['first_row'],
      lead_segments(pages.segments, tiles['first_row']),
      summaries,
      grid,
      Router(
        tiles['router_query'][:, :, 0],
        tiles['router_weight'][:, :, 0],
        router_key,
      ),
    )
    if earlier is not None:
      selection = _with_earlier(selection, *earlier, tiles['first_row'], grid)
    y, shares, masses = attend_tiles(
      tiles['query'],
      tiles['gates'],
      tiles['first_row'],
      tiles['segments'],
      pages,
      summaries if use_summaries else None,
      selection,
      grid,
      combine,
    )
    eligible = jnp.broadcast_to(
      is_eligible.sum(-1)[:, None], selection.weight.shape[:3]
    )
    stats = dict(
      kept=selection.weight.sum(-1),
      eligible=eligible,
      shares=mean_of_rows(shares, tiles['segments']),
      entropy=_entropy(importance),
      block=selection.block,
      is_kept=selection.is_kept,
    )
    if router.is_used:
      stats['router_loss'] = router_loss(importance, selection.block, masses)
    else:
      stats['router_loss'] = jnp.zeros(selection.block.shape[:3])
    return y, stats

  most_slots = min(grid.slots, pages.segments.shape[1])

  def run_chunks(chunks, slots):
    part = jax.tree.map(lambda x: x[chunks], tiles)
    on_part = functools.partial(run, dataclasses.replace(grid, slots=slots))
    y, stats = jax.lax.map(jax.checkpoint(on_part), part)
    for name in ('block', 'is_kept'):
      unused = most_slots - stats[name].shape[-1]
      stats[name] = jnp.pad(stats[name], [(0, 0)] * 4 + [(0, unused)])
    return y, stats

  y, stats = jax.tree.map(
    lambda *parts: jnp.concatenate(parts),
    *(
      run_chunks(*group)
      for group in _groups_of_chunks(
        num_chunks, per_chunk * grid.tile, first_row, grid
      )
    ),
  )
  y = jnp.moveaxis(y, 0, 1).reshape(batch, -1, num_heads, width)[:, :length]
  stats = tiles_in_order(stats, -(-length // grid.tile))
  return y.astype(query.dtype), stats


def _entropy(importance):
  importance = jax.lax.stop_gradient(importance)
  logs = jnp.log(jnp.where(importance > 0, importance, 1.0))
  return -(importance * logs).sum(-1)


def _groups_of_chunks(num_chunks, rows, first_row, grid):
  """Chunks that go together, and their slots.

  The first chunks of a sequence have few eligible blocks, and so few slots.
  """
  if not isinstance(first_row, int):
    return [(slice(None), grid.slots)]
  reach = 0 if grid.is_overlapping else grid.window_blocks
  last_tiles = [
    first_row + i * rows - grid.tile for i in range(1, num_chunks + 1)
  ]
  eligible = [max(1, row // grid.block - reach) for row in last_tiles]
  few = sum(2 * most <= grid.slots for most in eligible)
  groups = [(slice(few), eligible[few - 1]), (slice(few, None), grid.slots)]
  return groups[few == 0 : 1 + (few < num_chunks)]


def tiles_in_order(
  stats: dict[str, jax.Array], num_tiles: int
) -> dict[str, jax.Array]:
  """Figures [parts, B, K, tiles, ...] of all parts' tiles, [B, K, n, ...]."""
  return {
    name: jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:])[
      :, :, :num_tiles
    ]
    for name, x in stats.items()
  }


def _with_earlier(selection, earlier, row, first_row, grid):
  """The tile in which `row` lies keeps its choice, unless it begins there."""
  is_tile = (first_row < row) & (row < first_row + grid.tile)
  return Selection(
    *(
      jnp.where(is_tile[None, None, :, None], old[:, :, None], new)
      for old, new in zip(earlier, selection, strict=True)
    )
  )
