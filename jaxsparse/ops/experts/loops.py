# SPDX-License-Identifier: Apache-2.0
"""Loops over the experts that have rows, and over tiles of an expert's rows.

Trip counts are not static: only functions with a gradient of their own may call
them.

Letters as in `grouped_matmul`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxsparse.ops.quantized_matrix import QuantizedMatrix
from jaxsparse.ops.shard_map_vma import argsort

# A matrix for each expert.
Experts = Float[Array, 'X D F'] | QuantizedMatrix

# Rows of a tile, at least and at most.
_TILES = (16, 256)


def write_products(
  product: Callable,
  rows: Float[Array, 'A D'],
  sizes: Int[Array, 'X'],
  tile: int,
  is_chosen: Bool[Array, 'X'],
  out: Float[Array, 'A F'],
) -> Float[Array, 'A F']:
  """Writes the products of the chosen experts' rows to `out`.

  Args:
    product: takes an expert's number, and gives what multiplies a tile of rows.
    rows: sorted by expert.
    sizes: rows of each expert.
    tile: rows of a tile.
    is_chosen: experts.
    out: what stays of the other experts' rows.
  """
  ends = jnp.cumsum(sizes)

  def on_expert(expert: Int[Array, ''], out: Float[Array, 'A F']):
    product_of = product(expert)

    def on_tile(
      at: Int[Array, ''], is_own: Bool[Array, ' t'], out: Float[Array, 'A F']
    ):
      part = product_of(jax.lax.dynamic_slice_in_dim(rows, at, tile))
      before = jax.lax.dynamic_slice_in_dim(out, at, tile)
      return jax.lax.dynamic_update_slice_in_dim(
        out,
        jnp.where(is_own[:, None], part.astype(out.dtype), before),
        at,
        axis=0,
      )

    return over_tiles(on_tile, expert, ends, sizes, tile, len(rows), out)

  return over_experts(on_expert, is_chosen, out)


def tile_rows(num_rows: int, num_experts: int) -> int:
  """Rows of a tile: half of an expert's mean, as last tiles are part empty."""
  mean = max(1, num_rows // num_experts)
  least, most = _TILES
  tile = 1 << (mean.bit_length() - 1) >> 1
  return min(num_rows, max(least, min(most, tile)))


def over_experts(body: Callable, is_chosen: Bool[Array, 'X'], carry: PyTree):
  """`body(expert, carry)` for the chosen experts only."""
  order = argsort(~is_chosen).astype(jnp.int32)
  return jax.lax.fori_loop(
    0,
    is_chosen.sum(dtype=jnp.int32),
    lambda i, carry: body(order[i], carry),
    carry,
  )


def over_tiles(
  body: Callable,
  expert: Int[Array, ''],
  ends: Int[Array, 'X'],
  sizes: Int[Array, 'X'],
  tile: int,
  num_rows: int,
  carry: PyTree,
):
  """`body(first row, which are the expert's own, carry)` for its tiles.

  A tile that would reach beyond the last row is moved back.
  """
  end, size = ends[expert], sizes[expert]

  def on_tile(i: Int[Array, ''], carry: PyTree):
    begin = end - size + i * tile
    at = jnp.minimum(begin, num_rows - tile)
    place = at + jnp.arange(tile, dtype=at.dtype)
    return body(at, (place >= begin) & (place < end), carry)

  return jax.lax.fori_loop(0, (size + tile - 1) // tile, on_tile, carry)


def item(x: jax.Array, i: Int[Array, '']) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)
