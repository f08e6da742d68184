# SPDX-License-Identifier: Apache-2.0
"""Attention to a window, to some blocks before it, and to summaries of others.

A tile of queries reads three disjoint sets of keys: its window, row by row; the
blocks that `block_selection` keeps; and one key and value for each other
eligible block, which stands for all of its rows. 'merged' is one softmax over
all of them: keeping every block is dense attention; 'gated' adds up
three softmaxes (NSA, arXiv:2502.11089). A gate for each set, query and head
weighs them.

Letters as in `block_selection`; r rows of a tile, T = n r queries.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.ops.online_softmax import (
  masked_softmax,
  merge_states,
  partial_softmax,
)
from jaxsparse.ops.quantized_rows import (
  QuantizedRows,
  dtype_of_sums,
  split_rows,
)
from jaxsparse.ops.sparse_attention.block_selection import (
  Selection,
  eligible_blocks,
  lead_segments,
)
from jaxsparse.ops.sparse_attention.block_summaries import Summaries
from jaxsparse.ops.sparse_attention.sparse_inputs import SparseOptions

# Rotates keys [..., H] by their rows, which are broadcast over [...].
RopeFn = Callable[[jax.Array, jax.Array], jax.Array]


class Pages(NamedTuple):
  """Keys and values in the block layout."""

  key: Float[Array, 'B K Z b H'] | QuantizedRows
  value: Float[Array, 'B K Z b H'] | QuantizedRows
  segments: Int[Array, 'B Z b']


def to_pages(
  key: Float[Array, 'B S K H'] | QuantizedRows,
  value: Float[Array, 'B S K H'] | QuantizedRows,
  segments: Int[Array, 'B S'],
  block: int,
) -> Pages:
  """Rows in the block layout; what the last block lacks is padding."""
  missing = -segments.shape[1] % block

  def paged(x: jax.Array):
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, block, *x.shape[2:])

  key, value = jax.tree.map(
    lambda x: jnp.moveaxis(paged(x), 3, 1), (key, value)
  )
  return Pages(key, value, paged(segments))


def rotated(
  rotate: RopeFn, key: jax.Array | QuantizedRows, row: Int[Array, '...']
) -> jax.Array | QuantizedRows:
  """Keys [..., H] rotated by their rows; of quantized ones the codes."""
  if isinstance(key, QuantizedRows):
    return key._replace(codes=rotate(key.codes.astype(jnp.float32), row))
  return rotate(key, row)


def attend_tiles(
  query: Float[Array, 'B n r K G H'],
  gates: Float[Array, 'B n r K G 3'],
  first_row: Int[Array, ' n'],
  segments: Int[Array, 'B n r'],
  pages: Pages,
  summaries: Summaries,
  selection: Selection,
  options: SparseOptions,
  rotate: RopeFn | None = None,
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
    summaries: of the blocks, if the options are to read them.
    selection: the tiles' blocks.
    options: sizes, and what is read.
    rotate: rotates keys by their rows, if the pages' are not rotated.

  Returns:
    Sums of the values, 0 for padding; each set's share of the softmax
    ('merged') or its gate ('gated'); and each candidate's share of what the
    kept blocks get together, the mean over rows and heads, without a gradient.
  """
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  scaled = query.astype(dtype) * query.shape[-1] ** -0.5
  query = jnp.moveaxis(scaled, 3, 1).astype(query.dtype)
  gates = jnp.moveaxis(gates, 3, 1).astype(dtype)
  own_block = first_row // options.block
  kept, masses = _kept(query, segments, pages, selection, rotate)
  parts = [
    _window(query, first_row, segments, pages, own_block, options, rotate),
    kept,
  ]
  if options.use_summaries:
    lead = lead_segments(pages.segments, first_row - first_row % options.tile)
    is_read = eligible_blocks(summaries, own_block, lead, options)[:, None]
    if not options.is_overlapping:
      is_read &= ~_is_kept_block(selection, is_read.shape[-1])
    parts.append(_summarized(query, segments, summaries, is_read))
  y, shares = merge_states(parts, gates, options.combine)
  shares = jnp.pad(shares, [(0, 0)] * 5 + [(0, 3 - shares.shape[-1])])
  return *(jnp.moveaxis(x, 1, 3) for x in (y, shares)), masses


def _window(
  query: Float[Array, 'B K n r G H'],
  first_row: Int[Array, ' n'],
  segments: Int[Array, 'B n r'],
  pages: Pages,
  own_block: Int[Array, ' n'],
  options: SparseOptions,
  rotate: RopeFn | None,
):
  """Rows of the own block and the blocks of the window, none of them later."""
  offsets = jnp.arange(-options.window_blocks, 1)
  block = own_block[:, None] + offsets[None]
  row = block[..., None] * options.block + jnp.arange(options.block)[None, None]
  row = row.reshape(len(block), -1)
  key, value, of_keys = _read_window(pages, jnp.maximum(block, 0))
  if rotate is not None:
    key = rotated(rotate, key, row[None, None])
  own_row = first_row[:, None] + jnp.arange(segments.shape[2])[None]
  is_past = (row[:, None] <= own_row[..., None]) & (row >= 0)[:, None]
  is_seen = _same_document(segments, of_keys) & is_past[None]
  logits = _logits('bknrgh,bknlh->bknrgl', query, key)
  value, scale = split_rows(value, dtype_of_sums(query.dtype))
  is_seen = is_seen[:, None, :, :, None]
  return partial_softmax(logits, is_seen, value, value_scale=scale)


def _read_window(pages: Pages, block: Int[Array, 'n w']):
  """Keys and values [B, K, n, l, H] and segments [B, n, l] of the blocks."""

  def merged(x: jax.Array, axis: int):
    x = jnp.take(x, block, axis=axis, mode='clip')
    shape = (*x.shape[: axis + 1], -1, *x.shape[axis + 3 :])
    return x.reshape(shape)

  key, value = jax.tree.map(lambda x: merged(x, 2), (pages.key, pages.value))
  return key, value, merged(pages.segments, 1)


def _kept(
  query: Float[Array, 'B K n r G H'],
  segments: Int[Array, 'B n r'],
  pages: Pages,
  selection: Selection,
  rotate: RopeFn | None,
):
  """All rows of the kept blocks: each ends before the tile."""
  take = jax.vmap(jax.vmap(lambda x, i: x[i]))
  key, value = jax.tree.map(
    lambda x: take(x, selection.block), (pages.key, pages.value)
  )
  if rotate is not None:
    block = key.shape[-2]
    offset = jnp.arange(block)[None, None, None, None]
    key = rotated(rotate, key, selection.block[..., None] * block + offset)
  # The documents' rows are the same for all heads, the blocks are not.
  of_keys = jax.vmap(lambda x, i: x[i])(pages.segments, selection.block)
  shape = (*selection.block.shape[:3], -1)
  is_seen = _same_document(segments[:, None], of_keys.reshape(shape))[
    ..., None, :
  ]
  block = key.shape[-2]
  is_kept = jnp.repeat(selection.is_kept, block, axis=-1)[..., None, None, :]
  weight = jnp.repeat(selection.weight, block, axis=-1)[..., None, None, :]
  key, value = jax.tree.map(
    lambda x: x.reshape(*shape, *x.shape[5:]), (key, value)
  )
  logits = _logits('bknrgh,bknlh->bknrgl', query, key)
  value, scale = split_rows(value, dtype_of_sums(query.dtype))
  part = partial_softmax(logits, is_seen, value, is_kept, weight, scale)
  return part, _masses(logits, is_seen & is_kept, selection.block.shape[-1])


def _masses(
  logits: Float[Array, 'B K n r G l'],
  is_read: Bool[Array, '...'],
  num_candidates: int,
):
  """Shares [B, K, n, k] of the candidates in what the kept blocks get."""
  shares = masked_softmax(jax.lax.stop_gradient(logits), is_read).sum((3, 4))
  shares = shares.reshape(*shares.shape[:3], num_candidates, -1).sum(-1)
  total = shares.sum(-1, keepdims=True)
  return shares / jnp.where(total > 0, total, 1.0)


def _is_kept_block(selection: Selection, num_blocks: int):
  """Slots [B, K, n, k] to blocks [B, K, n, Z]."""
  block = jnp.arange(num_blocks)[None, None, None, None]
  is_block = selection.block[..., None] == block
  return jnp.any(is_block & selection.is_kept[..., None], axis=-2)


def _summarized(
  query: Float[Array, 'B K n r G H'],
  segments: Int[Array, 'B n r'],
  summaries: Summaries,
  is_read: Bool[Array, 'B #K n Z'],
):
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


def _logits(
  letters: str,
  query: Float[Array, 'B K n r G H'],
  key: Float[Array, '*keys H'] | QuantizedRows,
):
  dtype = jnp.promote_types(query.dtype, jnp.float32)
  key, scale = split_rows(key, query.dtype)
  key = key.astype(query.dtype)
  logits = jnp.einsum(letters, query, key, preferred_element_type=dtype)
  return logits if scale is None else logits * scale[:, :, :, None, None]


def _same_document(queries: Int[Array, '*#B r'], keys: Int[Array, '*#B l']):
  """[..., r] and [..., l] to [..., r, l]."""
  is_same = queries[..., :, None] == keys[..., None, :]
  return is_same & (queries > 0)[..., :, None]


def mean_of_rows(
  shares: Float[Array, 'B n r K G 3'], segments: Int[Array, 'B n r']
) -> Float[Array, 'B K n 3']:
  """Over the heads of a group and the rows of a tile, but for padding."""
  is_row = (segments > 0).astype(shares.dtype)
  total = jnp.einsum('bnrkgs,bnr->bkns', shares, is_row)
  count = jnp.maximum(is_row.sum(-1), 1) * shares.shape[4]
  return total / count[:, None, :, None]
