# SPDX-License-Identifier: Apache-2.0
"""Sparse attention of whole sequences: chunks of tiles that choose and attend.

`block_selection` says which blocks a tile keeps, `tile_attention` what it makes
of them; letters as there.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops.sparse_attention.block_router import Router, router_loss
from jaxsparse.ops.sparse_attention.block_selection import (
  Selection,
  choose,
  lead_segments,
)
from jaxsparse.ops.sparse_attention.block_summaries import (
  Summaries,
  mean_of_blocks,
  summarize,
)
from jaxsparse.ops.sparse_attention.sparse_inputs import (
  SparseInputs,
  SparseOptions,
)
from jaxsparse.ops.sparse_attention.tile_attention import (
  Pages,
  attend_tiles,
  mean_of_rows,
  to_pages,
)


def sparse_attention(
  inputs: SparseInputs,
  options: SparseOptions,
  *,
  key_segments: Int[Array, 'B S'] | None = None,
  first_row: Int[Array, ''] | int = 0,
  earlier: tuple[Selection, Int[Array, '']] | None = None,
) -> tuple[Float[Array, 'B T N H'], dict[str, jax.Array]]:
  """Sparse attention of all queries, chunk by chunk.

  Memory grows with T and with S and not with their product: the backward pass
  makes each chunk again.

  Args:
    inputs: queries and keys rotated; rows of keys after the queries' may hold
      anything finite.
    options: sizes, bounds, and what is read.
    key_segments: document of each key; None if the keys are the queries' own.
    first_row: of the queries among the keys' rows, a multiple of the block.
    earlier: the choice [B, K, k] of the first tile that has queries, and the
      row of the first of them, if other rows of that tile came before.

  Returns:
    Sums of the values, and of each tile and key/value head: how many blocks are
    'kept' [B, K, n] (with the gradient of the coverage) and 'eligible', the
    'block' of each candidate [B, K, n, k] and whether it 'is_kept', the
    'shares' [B, K, n, 3] of the three sets, and [B, K, n] the 'entropy' of the
    blocks' importance in nats and the 'router_loss'.
  """
  inputs = inputs.completed()
  if key_segments is None:
    key_segments = inputs.segments
  batch, length, *heads = inputs.query.shape
  keys = _keys(inputs, key_segments, options)
  tiles = _tiles(inputs, options, first_row)
  num_chunks, per_chunk = tiles.first_row.shape
  most_blocks = min(options.max_blocks, keys.pages.segments.shape[1])

  def run_chunks(chunks: slice, max_blocks: int):
    part = jax.tree.map(lambda x: x[chunks], tiles)
    bounded = dataclasses.replace(options, max_blocks=max_blocks)
    on_part = functools.partial(_attend_chunk, keys, bounded, earlier)
    y, stats = jax.lax.map(jax.checkpoint(on_part), part)
    for name in ('block', 'is_kept'):
      unused = most_blocks - stats[name].shape[-1]
      stats[name] = jnp.pad(stats[name], [(0, 0)] * 4 + [(0, unused)])
    return y, stats

  rows = per_chunk * options.tile
  groups = _groups_of_chunks(num_chunks, rows, first_row, options)
  y, stats = jax.tree.map(
    lambda *parts: jnp.concatenate(parts),
    *(run_chunks(*group) for group in groups),
  )
  y = jnp.moveaxis(y, 0, 1).reshape(batch, -1, *heads)
  stats = tiles_in_order(stats, -(-length // options.tile))
  return y[:, :length].astype(inputs.query.dtype), stats


class _Keys(NamedTuple):
  """What all tiles choose from and read."""

  pages: Pages
  summaries: Summaries
  router_key: Float[Array, 'B Z I']


def _keys(
  inputs: SparseInputs, segments: Int[Array, 'B S'], options: SparseOptions
) -> _Keys:
  key, router_key = inputs.key, inputs.router.key
  pages = to_pages(key, inputs.value, segments, options.block)
  missing = pages.segments.size // len(segments) - segments.shape[1]
  router_key = jnp.pad(router_key, [(0, 0), (0, missing), (0, 0)])
  return _Keys(
    pages, summarize(*pages), mean_of_blocks(router_key, pages.segments)
  )


class _Tiles(NamedTuple):
  """Arrays of the queries as [chunks, B, tiles, rows, ...]."""

  query: jax.Array
  gates: jax.Array
  coverage: jax.Array
  segments: jax.Array
  router_query: jax.Array
  router_weight: jax.Array
  # Of each tile, [chunks, tiles].
  first_row: jax.Array


def _tiles(
  inputs: SparseInputs,
  options: SparseOptions,
  first_row: Int[Array, ''] | int,
) -> _Tiles:
  batch, length, num_heads, width = inputs.query.shape
  tile, router = options.tile, inputs.router
  # A chunk that is longer than the sequence would be filled with padding.
  per_chunk = max(1, min(options.chunk // tile, -(-length // tile)))
  num_chunks = -(-length // (per_chunk * tile))
  missing = num_chunks * per_chunk * tile - length
  num_kv_heads = inputs.key.shape[2]
  heads = (num_kv_heads, num_heads // num_kv_heads)

  def tiled(x: jax.Array, *tail: int):
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    shape = (batch, num_chunks, per_chunk, tile, *tail)
    return jnp.moveaxis(x.reshape(shape), 1, 0)

  rows = (jnp.arange(num_chunks * per_chunk) * tile).reshape(num_chunks, -1)
  return _Tiles(
    query=tiled(inputs.query, *heads, width),
    gates=tiled(inputs.gates, *heads, 3),
    coverage=tiled(inputs.coverage, num_kv_heads),
    segments=tiled(inputs.segments),
    router_query=tiled(router.query, *router.query.shape[2:]),
    router_weight=tiled(router.weight, *router.weight.shape[2:]),
    first_row=first_row + rows,
  )


def _attend_chunk(
  keys: _Keys,
  options: SparseOptions,
  earlier: tuple[Selection, Int[Array, '']] | None,
  tiles: _Tiles,
):
  """Sums and figures of the tiles [tiles of a chunk, ...]."""
  router = Router(
    tiles.router_query[:, :, 0], tiles.router_weight[:, :, 0], keys.router_key
  )
  selection, is_eligible, importance = choose(
    tiles.query[:, :, 0],
    tiles.coverage[:, :, 0],
    tiles.first_row,
    lead_segments(keys.pages.segments, tiles.first_row),
    keys.summaries,
    options,
    router,
  )
  if earlier is not None:
    selection = _with_earlier(selection, *earlier, tiles.first_row, options)
  y, shares, masses = attend_tiles(
    tiles.query,
    tiles.gates,
    tiles.first_row,
    tiles.segments,
    keys.pages,
    keys.summaries,
    selection,
    options,
  )
  shape = selection.weight.shape[:3]
  stats = dict(
    kept=selection.weight.sum(-1),
    eligible=jnp.broadcast_to(is_eligible.sum(-1)[:, None], shape),
    shares=mean_of_rows(shares, tiles.segments),
    entropy=_entropy(importance),
    block=selection.block,
    is_kept=selection.is_kept,
    router_loss=router_loss(importance, selection.block, masses)
    if router.is_used
    else jnp.zeros(shape),
  )
  return y, stats


def _entropy(importance: Float[Array, 'B K n Z']):
  importance = jax.lax.stop_gradient(importance)
  logs = jnp.log(jnp.where(importance > 0, importance, 1.0))
  return -(importance * logs).sum(-1)


def _groups_of_chunks(
  num_chunks: int,
  rows: int,
  first_row: Int[Array, ''] | int,
  options: SparseOptions,
) -> list[tuple[slice, int]]:
  """Chunks that go together, and their most kept blocks.

  The first chunks of a sequence have few eligible blocks, and so keep few.
  """
  max_blocks = options.max_blocks
  if not isinstance(first_row, int):
    return [(slice(None), max_blocks)]
  reach = 0 if options.is_overlapping else options.window_blocks
  last_tiles = [
    first_row + i * rows - options.tile for i in range(1, num_chunks + 1)
  ]
  eligible = [max(1, row // options.block - reach) for row in last_tiles]
  few = sum(2 * most <= max_blocks for most in eligible)
  parts = [(slice(few), eligible[few - 1]), (slice(few, None), max_blocks)]
  return parts[few == 0 : 1 + (few < num_chunks)]


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


def _with_earlier(
  selection: Selection,
  earlier: Selection,
  row: Int[Array, ''],
  first_row: Int[Array, ' n'],
  options: SparseOptions,
) -> Selection:
  """The tile in which `row` lies keeps its choice, unless it begins there."""
  is_tile = (first_row < row) & (row < first_row + options.tile)
  return Selection(
    *(
      jnp.where(is_tile[None, None, :, None], old[:, :, None], new)
      for old, new in zip(earlier, selection, strict=True)
    )
  )
