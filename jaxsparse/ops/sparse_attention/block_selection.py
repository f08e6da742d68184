# SPDX-License-Identifier: Apache-2.0
"""Which blocks of keys a tile of queries reads (dynamic sparse attention).

Rows of a sequence form key blocks of b rows, the block layout. A query's window
is its own block and the `window_blocks` before it; all blocks before those are
eligible. Each has a summary (`block_summaries`). The softmax of its key's
products with a query over the eligible blocks, averaged over the query heads of
a key/value head, is a block's importance, unless a router computes it
(`block_router`). Blocks are kept, by descending importance, until those before
cover a share `coverage` of it, learned and different for each input (as
Twilight, arXiv:2502.02770, prunes by top-p), within static bounds.

One choice serves a tile of r rows, and its first row makes it: the choice then
looks at nothing later than any row of the tile, and decoding can make the same.

Letters: B batch, n tiles, N query heads, K key/value heads, G query heads of
each, H head width, Z blocks of b rows, k candidates, the blocks that may be
kept.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.ops.online_softmax import masked_softmax
from jaxsparse.ops.sparse_attention.block_router import Router, router_scores
from jaxsparse.ops.sparse_attention.block_summaries import Summaries
from jaxsparse.ops.sparse_attention.sparse_inputs import SparseOptions


class Selection(NamedTuple):
  """The blocks of each tile."""

  block: Int[Array, 'B K n k']
  # 1 for a kept block and 0 for another, with the gradient of the coverage.
  weight: Float[Array, 'B K n k']
  # The same without a gradient.
  is_kept: Bool[Array, 'B K n k']


def lead_segments(
  segments: Int[Array, 'B Z b'], first_row: Int[Array, ' n']
) -> Int[Array, 'B n']:
  """Document of each tile's first row, which may have come in another call."""
  rows = segments.reshape(len(segments), -1)
  return rows.at[:, first_row].get(mode='fill', fill_value=0)


def eligible_blocks(
  summaries: Summaries,
  own_block: Int[Array, ' n'],
  segments: Int[Array, 'B n'],
  options: SparseOptions,
) -> Bool[Array, 'B n Z']:
  """Complete blocks of the same document, outside the window.

  Args:
    summaries: of all blocks.
    own_block: block of each tile.
    segments: document of each tile's first row.
    options: whose window it is.
  """
  reach = 0 if options.is_overlapping else options.window_blocks
  block = jnp.arange(summaries.segment.shape[1])
  is_before = block[None, None] < own_block[None, :, None] - reach
  is_same = summaries.segment[:, None] == segments[..., None]
  return is_before & is_same & (segments > 0)[..., None]


def importance(
  query: Float[Array, 'B n K G H'],
  summaries: Summaries,
  is_eligible: Bool[Array, 'B n Z'],
) -> Float[Array, 'B K n Z']:
  """Shares of the eligible blocks, as the first row of each tile sees them.

  Of sum 1, or 0 where no block is eligible.
  """
  scores = jnp.einsum(
    'bnkgh,bkzh->bkngz',
    query.astype(summaries.key.dtype),
    summaries.key,
  )
  scores *= query.shape[-1] ** -0.5
  return masked_softmax(scores, is_eligible[:, None, :, None]).mean(axis=3)


def select(
  shares: Float[Array, 'B K n Z'],
  is_eligible: Bool[Array, 'B n Z'],
  coverage: Float[Array, 'B K n'],
  options: SparseOptions,
) -> Selection:
  """Keeps blocks until those before cover enough.

  Ties go to the earlier block, whatever the number of blocks: `lax.top_k` is
  stable, and it must be, or a longer sequence would choose otherwise.

  Args:
    shares: importance of each block.
    is_eligible: blocks that may be kept.
    coverage: share that is to be covered; infinity for all the candidates.
    options: bounds of the number of kept blocks.
  """
  mask = is_eligible[:, None]
  num_eligible = is_eligible.sum(-1)[:, None, :, None]
  position = jnp.cumsum(is_eligible, axis=-1)[:, None]
  is_sink = mask & (position <= options.sinks)
  order = jnp.where(mask, shares + 2.0 * is_sink, -1.0)
  num_candidates = min(options.max_blocks, shares.shape[-1])
  order, block = jax.lax.top_k(jax.lax.stop_gradient(order), num_candidates)
  share = jnp.take_along_axis(shares, block, axis=-1)
  before = jnp.cumsum(share, axis=-1) - share
  soft = jax.nn.sigmoid((coverage[..., None] - before) / options.temperature)
  least, most = _bounds(num_eligible, options)
  place = jnp.arange(num_candidates)[None, None, None]
  may_be_kept = (order >= 0) & (place < most)
  is_kept = may_be_kept & ((soft >= 0.5) | (place < least) | (order >= 2))
  surrogate = jnp.where(may_be_kept, soft - jax.lax.stop_gradient(soft), 0.0)
  weight = is_kept.astype(soft.dtype) + surrogate
  return Selection(block.astype(jnp.int32), weight, is_kept)


def _bounds(num_eligible: Int[Array, 'B 1 n 1'], options: SparseOptions):
  if not options.max_fraction:
    return options.min_blocks, options.max_blocks
  least = jnp.ceil(options.min_fraction * num_eligible)
  most = jnp.ceil(options.max_fraction * num_eligible)
  most = jnp.maximum(options.sinks, most)
  return least, jnp.minimum(most, options.max_blocks)


def choose(
  query: Float[Array, 'B n K G H'],
  coverage: Float[Array, 'B n K'],
  first_row: Int[Array, ' n'],
  segments: Int[Array, 'B n'],
  summaries: Summaries,
  options: SparseOptions,
  router: Router,
) -> tuple[Selection, Bool[Array, 'B n Z'], Float[Array, 'B K n Z']]:
  """The blocks of each tile, by its first row.

  Args:
    query: of each tile's first row, as the next ones.
    coverage: share of importance that is to be covered.
    first_row: the rows.
    segments: their documents.
    summaries: of the blocks.
    options: sizes and bounds.
    router: queries of the n rows and keys of the Z blocks, if it is in use.

  Returns:
    The choice, which blocks were eligible, and the importance of each.
  """
  own_block = first_row // options.block
  is_eligible = eligible_blocks(summaries, own_block, segments, options)
  coverage = jnp.moveaxis(coverage, 2, 1)
  if not router.is_used:
    shares = importance(query, summaries, is_eligible)
    return select(shares, is_eligible, coverage, options), is_eligible, shares
  shares = masked_softmax(router_scores(router), is_eligible)[:, None]
  # The same for all heads, whose coverage may differ.
  shares = jnp.broadcast_to(shares, (*coverage.shape, shares.shape[-1]))
  fixed = jax.lax.stop_gradient(shares)
  return select(fixed, is_eligible, coverage, options), is_eligible, shares
