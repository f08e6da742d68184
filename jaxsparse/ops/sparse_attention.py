"""Attention to a window, to some blocks before it, and to summaries of others.

A tile of queries reads three disjoint sets of keys: its window, row by row; the
blocks that `block_selection` keeps; and one key and value for each other
eligible block, which stands for all of its rows. 'merged' is one softmax over
all of them, so that keeping every block is dense attention; 'gated' adds up
three softmaxes (NSA, arXiv:2502.11089). A gate for each set, query and head
weighs them.

Letters as in `block_selection`; r rows of a tile, T = n r queries.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops.block_router import Router, no_router, router_loss
from jaxsparse.ops.block_selection import (
  Grid,
  Selection,
  choose,
  eligible_blocks,
  lead_segments,
)
from jaxsparse.ops.block_summaries import (
  Pooling,
  Summaries,
  Turn,
  join_summaries,
  mean_of_blocks,
  summarize,
)
from jaxsparse.ops.partial_softmax import (
  combined,
  masked_softmax,
  partial_softmax,
)


class Pages(NamedTuple):
  """Keys and values on the grid of blocks."""

  key: Float[Array, 'B K Z b H']
  value: Float[Array, 'B K Z b H']
  segments: Int[Array, 'B Z b']


def to_pages(
  key: Float[Array, 'B S K H'],
  value: Float[Array, 'B S K H'],
  segments: Int[Array, 'B S'],
  block: int,
) -> Pages:
  """Rows on the grid; what the last block lacks is padding."""
  length = key.shape[1]
  missing = -length % block

  def paged(x):
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])

  key, value = (jnp.moveaxis(paged(x), 3, 1) for x in (key, value))
  return Pages(key, value, paged(segments))


def attend_tiles(
  query: Float[Array, 'B n r K G H'],
  gates: Float[Array, 'B n r K G 3'],
  first_row: Int[Array, ' n'],
  segments: Int[Array, 'B n r'],
  pages: Pages,
  summaries: Summaries | None,
  selection: Selection,
  grid: Grid,
  combine: str = 'merged',
  turn: Turn | None = None,
  forgotten: Summaries | None = None,
) -> tuple[
  Float[Array, 'B n r K G H'],
  Float[Array, 'B n r K G 3'],
  Float[Array, 'B K n k'],
]:
  """Attention of given tiles with given blocks.

  Args:
    query: rotated.
    gates: factors of the window, the kept blocks and the summaries.
    first_row: of each tile, or of the part of it that is here.
    segments: document of each query; 0 for padding.
    pages: all keys and values; rows after a query's own may hold anything that
      is finite.
    summaries: of the blocks, or None to do without them.
    selection: the tiles' blocks.
    grid: sizes.
    combine: 'merged' or 'gated'.
    turn: rotates keys by their rows, if the pages' are not rotated.
    forgotten: summaries of blocks that are in no page, which are read, too.

  Returns:
    Sums of the values, 0 for padding; each set's share of the softmax
    ('merged') or its gate ('gated'); and each slot's share of what the kept
    blocks get together, the mean over rows and heads, without a gradient.
  """
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  scaled = query.astype(dtype) * query.shape[-1] ** -0.5
  query = jnp.moveaxis(scaled, 3, 1).astype(query.dtype)
  gates = jnp.moveaxis(gates, 3, 1).astype(dtype)
  own_block = first_row // grid.block
  kept, masses = _kept(query, segments, pages, selection, turn)
  parts = [
    _window(query, first_row, segments, pages, own_block, grid, turn),
    kept,
  ]
  if summaries is not None:
    lead = lead_segments(pages.segments, first_row - first_row % grid.tile)
    is_read = eligible_blocks(summaries, own_block, lead, grid)[:, None]
    if not grid.is_overlapping:
      is_read &= ~_is_kept_block(selection, is_read.shape[-1])
    if forgotten is not None:
      is_same = forgotten.segment[:, None] == lead[..., None]
      is_same = jnp.broadcast_to(
        (is_same & (forgotten.count > 0)[:, None])[:, None],
        (*is_read.shape[:-1], is_same.shape[-1]),
      )
      is_read = jnp.concatenate([is_same, is_read], axis=-1)
      summaries = join_summaries(forgotten, summaries)
    parts.append(_summarized(query, segments, summaries, is_read))
  y, shares = combined(parts, gates, combine)
  shares = jnp.pad(shares, [(0, 0)] * 5 + [(0, 3 - shares.shape[-1])])
  return *(jnp.moveaxis(x, 1, 3) for x in (y, shares)), masses


def _window(query, first_row, segments, pages, own_block, grid, turn):
  """Rows of the own block and the blocks of the window, none of them later."""
  offsets = jnp.arange(-grid.window_blocks, 1)
  block = own_block[:, None] + offsets[None]
  row = block[..., None] * grid.block + jnp.arange(grid.block)[None, None]
  row = row.reshape(len(block), -1)
  key, value, of_keys = _read_window(pages, jnp.maximum(block, 0))
  if turn is not None:
    key = turn(key, row[None, None])
  own_row = first_row[:, None] + jnp.arange(segments.shape[2])[None]
  is_past = (row[:, None] <= own_row[..., None]) & (row >= 0)[:, None]
  is_seen = _same_document(segments, of_keys) & is_past[None]
  logits = _logits('bknrgh,bknlh->bknrgl', query, key)
  return partial_softmax(logits, is_seen[:, None, :, :, None], value)


def _read_window(pages, block):
  """Keys and values [B, K, n, l, H] and segments [B, n, l] of the blocks."""

  def merged(x, axis):
    x = jnp.take(x, block, axis=axis, mode='clip')
    shape = (*x.shape[: axis + 1], -1, *x.shape[axis + 3 :])
    return x.reshape(shape)

  return merged(pages.key, 2), merged(pages.value, 2), merged(pages.segments, 1)


def _kept(query, segments, pages, selection, turn):
  """All rows of the kept blocks: each ends before the tile."""
  take = jax.vmap(jax.vmap(lambda x, i: x[i]))
  key, value = (take(x, selection.block) for x in (pages.key, pages.value))
  if turn is not None:
    block = key.shape[-2]
    offset = jnp.arange(block)[None, None, None, None]
    key = turn(key, selection.block[..., None] * block + offset)
  # The documents' rows are the same for all heads, the blocks are not.
  of_keys = jax.vmap(lambda x, i: x[i])(pages.segments, selection.block)
  shape = (*selection.block.shape[:3], -1)
  is_seen = _same_document(segments[:, None], of_keys.reshape(shape))[
    ..., None, :
  ]
  block = key.shape[-2]
  is_kept = jnp.repeat(selection.is_kept, block, axis=-1)[..., None, None, :]
  weight = jnp.repeat(selection.weight, block, axis=-1)[..., None, None, :]
  key, value = (x.reshape(*shape, x.shape[-1]) for x in (key, value))
  logits = _logits('bknrgh,bknlh->bknrgl', query, key)
  part = partial_softmax(logits, is_seen, value, is_kept, weight)
  return part, _masses(logits, is_seen & is_kept, selection.block.shape[-1])


def _masses(logits, is_read, num_slots):
  """Shares [B, K, n, k] of the slots among what is read of the kept blocks."""
  shares = masked_softmax(jax.lax.stop_gradient(logits), is_read).sum((3, 4))
  shares = shares.reshape(*shares.shape[:3], num_slots, -1).sum(-1)
  total = shares.sum(-1, keepdims=True)
  return shares / jnp.where(total > 0, total, 1.0)


def _is_kept_block(selection, num_blocks):
  """Slots [B, K, n, k] to blocks [B, K, n, Z]."""
  block = jnp.arange(num_blocks)[None, None, None, None]
  is_block = selection.block[..., None] == block
  return jnp.any(is_block & selection.is_kept[..., None], axis=-2)


def _summarized(query, segments, summaries, is_read):
  """One key and value for each block that is read so."""
  batch, _, num_tiles, num_blocks = is_read.shape
  of_keys = jnp.broadcast_to(
    summaries.segment[:, None], (batch, num_tiles, num_blocks)
  )
  is_same = _same_document(segments, of_keys)
  is_seen = is_read[..., None, None, :] & is_same[:, None, :, :, None]
  logits = _logits('bknrgh,bkzh->bknrgz', query, summaries.key)
  count = jnp.maximum(summaries.count, 1).astype(logits.dtype)
  logits += jnp.log(count)[:, None, None, None, None]
  return partial_softmax(logits, is_seen, summaries.value.astype(query.dtype))


def _logits(letters, query, key):
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  key = key.astype(query.dtype)
  return jnp.einsum(letters, query, key, preferred_element_type=dtype)


def _same_document(queries, keys):
  """[..., r] and [..., l] to [..., r, l]."""
  is_same = queries[..., :, None] == keys[..., None, :]
  return is_same & (queries > 0)[..., :, None]


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


def mean_of_rows(
  shares: Float[Array, 'B n r K G 3'], segments: Int[Array, 'B n r']
) -> Float[Array, 'B K n 3']:
  """Over the heads of a group and the rows of a tile, but for padding."""
  is_row = (segments > 0).astype(shares.dtype)
  total = jnp.einsum('bnrkgs,bnr->bkns', shares, is_row)
  count = jnp.maximum(is_row.sum(-1), 1) * shares.shape[4]
  return total / count[:, None, :, None]


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
