# SPDX-License-Identifier: Apache-2.0
"""Sparse attention that goes on from a cache: the same numbers, token by token.

A cache holds keys and values in the block layout, the blocks' summaries, and
the blocks that the last tile keeps. A tile's choice is made at its first row
and serves the tile's other rows when they come, in the same call or in later
ones: no partition of a sequence into calls changes a number.

Quantized keys and values are quantized as they are written, and summaries are
of what is then read: those of a block that is not full could not be made of
anything else when its other rows come.

Letters as in `block_selection`; S = Z b rows of the cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.ops.quantized_rows import QuantizedRows, quantize_rows
from jaxsparse.ops.sparse_attention.block_router import Router
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
from jaxsparse.ops.sparse_attention.sparse_attention import sparse_attention
from jaxsparse.ops.sparse_attention.sparse_inputs import (
  SparseInputs,
  SparseOptions,
)
from jaxsparse.ops.sparse_attention.tile_attention import (
  Pages,
  RopeFn,
  attend_tiles,
  mean_of_rows,
  rotated,
)


class SparseCache(NamedTuple):
  """What a layer keeps of earlier tokens."""

  key: Float[Array, 'B K S H'] | QuantizedRows
  value: Float[Array, 'B K S H'] | QuantizedRows
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
    def paged(x: jax.Array, axis: int):
      return x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :])

    key, value = jax.tree.map(lambda x: paged(x, 2), (self.key, self.value))
    return Pages(key, value, paged(self.segments, 1))


def init_sparse_cache(
  batch: int,
  num_kv_heads: int,
  length: int,
  width: int,
  options: SparseOptions,
  dtype: jax.typing.DTypeLike = jnp.float32,
  router_width: int = 0,
  is_quantized: bool = False,
) -> SparseCache:
  """An empty cache for at least `length` rows."""
  num_blocks = -(-length // options.block)
  max_blocks = min(options.max_blocks, num_blocks)
  f32 = jnp.promote_types(dtype, jnp.float32)

  def rows():
    shape = (batch, num_kv_heads, num_blocks * options.block)
    if not is_quantized:
      return jnp.zeros((*shape, width), dtype)
    codes = jnp.zeros((*shape, width), jnp.int8)
    return QuantizedRows(codes, jnp.zeros(shape, jnp.float32))

  def means():
    return jnp.zeros((batch, num_kv_heads, num_blocks, width), f32)

  def numbers(*shape):
    return jnp.zeros((batch, *shape), jnp.int32)

  return SparseCache(
    rows(), rows(), numbers(num_blocks * options.block),
    means(), means(), numbers(num_blocks), numbers(num_blocks),
    jnp.zeros((batch, num_blocks * options.block, router_width), f32),
    jnp.zeros((batch, num_blocks, router_width), f32),
    numbers(num_kv_heads, max_blocks), numbers(num_kv_heads, max_blocks) > 0,
  )  # fmt: skip


def append(
  cache: SparseCache,
  index: Int[Array, ''],
  inputs: SparseInputs,
  options: SparseOptions,
  rotate: RopeFn | None = None,
) -> SparseCache:
  """Writes rows at `index`, and the summaries of the blocks they touch.

  With `rotate`, keys are not rotated yet, and summaries are of keys that are by
  their rows in the block.
  """

  def write(old: jax.Array, new: jax.Array, start: jax.Array, axis: int):
    return jax.lax.dynamic_update_slice_in_dim(
      old, new.astype(old.dtype), start, axis
    )

  def with_rows(old: jax.Array | QuantizedRows, new: jax.Array):
    new = jnp.moveaxis(new, 1, 2)
    if isinstance(old, QuantizedRows):
      new = quantize_rows(new)
    return jax.tree.map(lambda old, new: write(old, new, index, 2), old, new)

  cache = cache._replace(
    key=with_rows(cache.key, inputs.key),
    value=with_rows(cache.value, inputs.value),
    segments=write(cache.segments, inputs.segments, index, 1),
    router_key=write(cache.router_key, inputs.router.key, index, 1),
  )
  pages, num_blocks = cache.pages(options.block), cache.summary_count.shape[1]
  length = inputs.segments.shape[1]
  # As many blocks as T rows can touch, wherever they begin.
  touched = min(num_blocks, (length + 2 * options.block - 2) // options.block)
  first = jnp.minimum(index // options.block, num_blocks - touched)

  def near_of(x: jax.Array, axis: int):
    return jax.lax.dynamic_slice_in_dim(x, first, touched, axis)

  near = Pages(
    *jax.tree.map(lambda x: near_of(x, 2), (pages.key, pages.value)),
    near_of(pages.segments, 1),
  )
  if rotate is not None:
    offset = jnp.arange(options.block)[None, None, None]
    near = near._replace(key=rotated(rotate, near.key, offset))
  new = summarize(*near)
  summaries = Summaries(
    *(
      write(old, some, first, axis)
      for old, some, axis in zip(
        cache.summaries, new, (2, 2, 1, 1), strict=True
      )
    )
  )
  rows = jax.lax.dynamic_slice_in_dim(
    cache.router_key, first * options.block, touched * options.block, 1
  )
  router_means = mean_of_blocks(rows, near.segments)
  return cache._replace(
    **{f'summary_{n}': x for n, x in summaries._asdict().items()},
    summary_router_key=write(cache.summary_router_key, router_means, first, 1),
  )


def cached_sparse_attention(
  inputs: SparseInputs,
  cache: SparseCache,
  index: Int[Array, ''],
  options: SparseOptions,
  count: Int[Array, ''] | None = None,
) -> tuple[Float[Array, 'B T N H'], SparseCache, dict[str, jax.Array]]:
  """T new tokens, whose rows begin at `index`; the cache must have room.

  See `sparse_attention`. One token reads its window, the kept blocks
  and the summaries, whatever the length of the cache. Of several only the first
  `count` stay, if it is given: what comes next is written over the others.
  """
  inputs = inputs.completed()
  length = inputs.query.shape[1]
  cache = append(cache, index, inputs, options)
  if length == 1:
    return _one_token(inputs, cache, index, options)
  # Tiles begin with a key block: rows before the first are padding here.
  before = index % options.block
  shift = options.block - 1

  def placed(x: jax.Array):
    shape = (x.shape[0], shift + length, *x.shape[2:])
    return jax.lax.dynamic_update_slice_in_dim(
      jnp.zeros(shape, x.dtype), x, before, 1
    )

  earlier = Selection(
    cache.kept_block,
    cache.is_kept.astype(cache.summary_key.dtype),
    cache.is_kept,
  )
  key, value = jax.tree.map(
    lambda x: jnp.moveaxis(x, 2, 1), (cache.key, cache.value)
  )
  y, stats = sparse_attention(
    SparseInputs(
      query=placed(inputs.query),
      key=key,
      value=value,
      segments=placed(inputs.segments),
      coverage=placed(inputs.coverage),
      gates=placed(inputs.gates),
      router=Router(
        placed(inputs.router.query),
        placed(inputs.router.weight),
        cache.router_key,
      ),
    ),
    options,
    key_segments=cache.segments,
    first_row=index - before,
    earlier=(earlier, index),
  )
  y = jax.lax.dynamic_slice_in_dim(y, before, length, 1)
  last = (before + (length if count is None else count) - 1) // options.tile
  kept_block, is_kept = (
    jax.lax.dynamic_index_in_dim(stats[name], last, 2, keepdims=False)
    for name in ('block', 'is_kept')
  )
  return y, cache._replace(kept_block=kept_block, is_kept=is_kept), stats


def _one_token(
  inputs: SparseInputs,
  cache: SparseCache,
  index: Int[Array, ''],
  options: SparseOptions,
):
  batch, _, num_heads, width = inputs.query.shape
  num_kv_heads = cache.key.shape[1]
  heads = (num_kv_heads, num_heads // num_kv_heads)
  query = inputs.query.reshape(batch, 1, 1, *heads, width)
  segments = inputs.segments[:, None]
  pages, first_row = cache.pages(options.block), index - index % options.tile
  lead = lead_segments(pages.segments, first_row[None])
  new, is_eligible, _ = choose(
    query[:, :, 0],
    inputs.coverage,
    index[None],
    lead,
    cache.summaries,
    options,
    inputs.router._replace(key=cache.summary_router_key),
  )
  is_first = index % options.tile == 0
  block = jnp.where(is_first, new.block[:, :, 0], cache.kept_block)
  is_kept = jnp.where(is_first, new.is_kept[:, :, 0], cache.is_kept)
  selection = Selection(
    block[:, :, None],
    is_kept.astype(new.weight.dtype)[:, :, None],
    is_kept[:, :, None],
  )
  y, shares, _ = attend_tiles(
    query,
    inputs.gates.reshape(batch, 1, 1, *heads, 3),
    index[None],
    segments,
    pages,
    cache.summaries,
    selection,
    options,
  )
  stats = dict(
    kept=selection.weight.sum(-1),
    eligible=jnp.broadcast_to(
      is_eligible.sum(-1)[:, None], (batch, num_kv_heads, 1)
    ),
    shares=mean_of_rows(shares, segments),
  )
  y = y.reshape(batch, 1, num_heads, width).astype(inputs.query.dtype)
  return y, cache._replace(kept_block=block, is_kept=is_kept), stats
