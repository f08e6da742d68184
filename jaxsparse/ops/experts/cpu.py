# SPDX-License-Identifier: Apache-2.0
"""Products of few rows for XLA's CPU, where dots take whole buffers.

A dot with a matrix that is cut out of all experts' costs a copy of it there.
The sum of scaled matrix rows is written out instead, which XLA fuses with the
cut.

Letters as in `grouped_matmul`.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.ops import chunking
from jaxsparse.ops.experts.loops import Experts, item, write_products
from jaxsparse.ops.quantized_matrix import QuantizedMatrix

# Experts with up to so many rows are multiplied without a copy, so many rows at
# once.
_FEW_ROWS = {1: 1, 8: 4}

# Elements of a matrix that one fused kernel adds up.
_FUSED_ELEMENTS = 2**13


def few_rows(
  rows: Float[Array, 'A D'],
  experts: Experts,
  sizes: Int[Array, 'X'],
  has_all: bool = False,
) -> tuple[Float[Array, 'A F'], Bool[Array, 'X']]:
  """Products of the experts with few rows, and which experts are left.

  With `has_all` none is: a row's sums are in one order, however many there are.
  """
  out = chunking.zeros((len(rows), experts.shape[2]), rows.dtype, rows, experts)

  def in_place(expert: Int[Array, '']):
    return lambda part: _product_in_place(part, experts, expert)

  done, tiles = 0, dict(_FEW_ROWS)
  if has_all:
    tiles[max(tiles) + len(rows)] = max(tiles.values())
  for most, tile in tiles.items():
    is_chosen = (sizes > done) & (sizes <= most)
    tile = min(tile, len(rows))
    out = write_products(in_place, rows, sizes, tile, is_chosen, out)
    done = most
  return out, sizes > done


def one_by_one(
  rows: Float[Array, 'A D'],
  experts: Experts,
  expert: Int[Array, 'A'],
) -> Float[Array, 'A F']:
  """`assigned_matmul` row by row; nothing is read for rows of no expert."""

  def add(i: Int[Array, ''], out: Float[Array, 'A F']):
    row = jax.lax.dynamic_slice_in_dim(rows, i, 1)
    product = _product_in_place(
      row, experts, expert[i], expert[i] < num_experts
    )
    return jax.lax.dynamic_update_slice_in_dim(
      out, product.astype(rows.dtype), i, 0
    )

  num_experts, shape = len(experts), (len(rows), experts.shape[2])
  out = chunking.zeros(shape, rows.dtype, rows, experts)
  return jax.lax.fori_loop(0, len(rows), add, out)


def _product_in_place(
  rows: Float[Array, 's D'],
  experts: Experts,
  expert: Int[Array, ''],
  is_there: Bool[Array, ''] | bool = True,
):
  """rows @ experts[expert] for a few rows, the matrix read where it lies."""
  dtype = chunking.accumulator(rows)
  _, depth, width = experts.shape
  total = chunking.zeros((len(rows), width), dtype, rows, experts, expert)
  scales = rows.T.astype(dtype)
  if isinstance(experts, QuantizedMatrix) and experts.group:
    num_chunks, add = _add_group(scales, experts, expert)
  else:
    chunk_size = _FUSED_ELEMENTS // width
    chunk_size = math.gcd(depth, max(8, min(32, chunk_size)))
    num_chunks = depth // chunk_size
    is_quantized = isinstance(experts, QuantizedMatrix)
    flat = experts.codes if is_quantized else experts
    flat = flat.reshape(-1, width)
    scales = scales.reshape(num_chunks, chunk_size, -1)

    def add(i: Int[Array, ''], total: Float[Array, 's F']):
      scale = item(scales, i)
      for j in range(chunk_size):
        place = expert * depth + i * chunk_size + j
        line = item(*chunking.read_in_place(flat, place))
        line = line.astype(rows.dtype).astype(dtype)
        total += scale[j][:, None] * line[None]
      return total

  if is_there is not True:
    num_chunks *= is_there
  total = jax.lax.fori_loop(0, num_chunks, add, total)
  if isinstance(experts, QuantizedMatrix) and not experts.group:
    total *= item(experts.scale, expert).astype(dtype)
  return total


def _add_group(scales, experts, expert):
  """Products with a part of one group of a 4-bit matrix, two lines a byte."""
  _, num_groups, half, width = experts.codes.shape
  size = math.gcd(half, max(4, _FUSED_ELEMENTS // (2 * width)))
  flat, of_group = (
    x.reshape(-1, width) for x in (experts.codes, experts.scale)
  )
  # Of the low and the high halves of each part.
  scales = scales.reshape(num_groups, 2, half // size, size, -1)
  scales = scales.swapaxes(1, 2).reshape(-1, 2, size, scales.shape[-1])

  def add(i: Int[Array, ''], total: Float[Array, 's F']):
    begin, scale = expert * num_groups * half + i * size, item(scales, i)
    part = jnp.zeros_like(total)
    for j in range(size):
      line = item(*chunking.read_in_place(flat, begin + j))
      for number, of_line in zip(experts.halves(line), scale, strict=True):
        part += of_line[j][:, None] * number.astype(total.dtype)[None]
    group = expert * num_groups + i // (half // size)
    return total + part * item(of_group, group)[None]

  return num_groups * half // size, add
