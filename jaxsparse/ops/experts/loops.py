"""Loops over the experts that have rows, and over tiles of an expert's rows.

Trip counts are not static: only functions with a gradient of their own may call
them.

Letters: X experts.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from jaxsparse.ops.shard_map_vma import argsort

# Rows of a tile, at least and at most.
_TILES = (16, 256)


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
