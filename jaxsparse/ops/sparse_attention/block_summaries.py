# SPDX-License-Identifier: Apache-2.0
"""One key and one value that stand for a block of rows.

The means of the rotated keys and of the values: the key's product with a query
is the mean of the query's scores in the block (MoBA, arXiv:2502.13189). Of
quantized rows they are means of the numbers that are read, in f32: a block is
chosen by what it is, however its rows came.

Letters: B batch, K key/value heads, H head width, Z blocks of b rows.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops.quantized_rows import QuantizedRows, split_rows


class Summaries(NamedTuple):
  """What is known of each block without reading it."""

  # Means over the rows of the block's last document.
  key: Float[Array, 'B K Z H']
  value: Float[Array, 'B K Z H']
  # Their number, and the document.
  count: Int[Array, 'B Z']
  segment: Int[Array, 'B Z']


def summarize(
  key: Float[Array, 'B K Z b H'] | QuantizedRows,
  value: Float[Array, 'B K Z b H'] | QuantizedRows,
  segments: Int[Array, 'B Z b'],
) -> Summaries:
  """Summaries of all blocks, in f32 at least.

  Only the last document of a block can go on after it, so the summary is that
  one's; segment 0 is padding.

  Args:
    key: rotated by their positions.
    value: as `key`.
    segments: document of each row.
  """
  is_own, count = _own_rows(segments)
  weight = is_own / jnp.maximum(count, 1)[..., None]
  key, value = (_means(x, weight) for x in (key, value))
  return Summaries(key, value, count.astype(jnp.int32), segments[..., -1])


def _means(
  x: Float[Array, 'B K Z b H'] | QuantizedRows, weight: Float[Array, 'B Z b']
):
  x, scale = split_rows(x, jnp.float32)
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  weight = weight.astype(x.dtype)
  if scale is None:
    return jnp.einsum('bkzsh,bzs->bkzh', x, weight)
  return jnp.einsum('bkzsh,bkzs->bkzh', x, scale * weight[:, None])


def _own_rows(segments: Int[Array, 'B Z b']):
  """Which rows are of their block's last document, and their number."""
  last = segments[..., -1]
  is_own = (segments == last[..., None]) & (last > 0)[..., None]
  return is_own, is_own.sum(-1)


def mean_of_blocks(
  rows: Float[Array, 'B S I'], segments: Int[Array, 'B Z b']
) -> Float[Array, 'B Z I']:
  """Means over the same rows as those of `summarize`, in f32 at least."""
  is_own, count = _own_rows(segments)
  dtype = jnp.promote_types(rows.dtype, jnp.float32)
  share = is_own / jnp.maximum(count, 1)[..., None].astype(dtype)
  on_grid = rows.reshape(*segments.shape, rows.shape[-1])
  return jnp.einsum('bzsi,bzs->bzi', on_grid.astype(dtype), share)
