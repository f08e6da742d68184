# SPDX-License-Identifier: Apache-2.0
"""Products of rows with their experts' matrices, in one Triton kernel each.

XLA's loop over experts returns to the host for every expert and every tile; a
launch grid does not: it has one program for each tile of an expert's rows and
each tile of columns. Tiles beyond the last expert's end at once: matrices of
experts without rows are never read. An expert with up to 16 rows is read once.

Sums are in f32. Matrices may be stored in another type than the rows'.

Letters: A rows, one for each assignment, X experts, D and F widths.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.ops.kernels.tile_product import dot

# Rows of a tile at least and at most, as tensor cores want at least 16.
_ROWS = 16, 64
# Columns of a tile, and elements of the sum that are multiplied at once.
_COLUMNS, _DEPTH = 128, 64
# Columns of a tile at least, and programs for which they become fewer.
_LEAST_COLUMNS, _PROGRAMS = 32, 256
# Positions are 32 bits wide.
_MOST_ELEMENTS = 2**31 - 1

# What has a shape and a type.
_Shaped = jax.Array | jax.ShapeDtypeStruct


def unsupported_reason(rows: _Shaped, experts: _Shaped) -> str | None:
  """What keeps the kernels from serving arrays of such shapes, in words."""
  if experts.size > _MOST_ELEMENTS:
    return f'{experts.size} elements of matrices are not below 2^31'
  if rows.size == 0 or experts.size == 0:
    return 'there is nothing to multiply'
  if rows.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    return f'it takes 16 or 32 bits and not {rows.dtype}'
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
  rows: Float[Array, 'A D'],
  experts: Float[Array, 'X D F'],
  sizes: Int[Array, 'X'],
  interpret: bool = False,
) -> Float[Array, 'A F']:
  """`ops.experts.grouped_matmul.grouped_matmul` on a GPU.

  Args:
    rows: those of expert 0 first; those that belong to none give zero.
    experts: a matrix for each.
    sizes: rows of each expert, together at most A.
    interpret: run in Pallas interpret mode (tests).
  """
  return _products(rows, experts, sizes, interpret, is_transposed=False)


def _forward(
  rows: Float[Array, 'A D'],
  experts: Float[Array, 'X D F'],
  sizes: Int[Array, 'X'],
  interpret: bool,
):
  return grouped_matmul(rows, experts, sizes, interpret), (rows, experts, sizes)


def _backward(
  interpret: bool,
  inputs: tuple[jax.Array, jax.Array, jax.Array],
  cotangent: Float[Array, 'A F'],
):
  rows, experts, sizes = inputs
  d_rows = _products(cotangent, experts, sizes, interpret, is_transposed=True)
  d_experts = _outer_products(rows, cotangent, sizes, experts.dtype, interpret)
  return d_rows, d_experts, None


grouped_matmul.defvjp(_forward, _backward)


def assigned_matmul(
  rows: Float[Array, 'A D'],
  experts: Float[Array, 'X D F'],
  expert: Int[Array, 'A'],
  interpret: bool = False,
) -> Float[Array, 'A F']:
  """`assigned_matmul` of the same file on a GPU, without a gradient."""
  place = jnp.arange(len(rows), dtype=expert.dtype)
  tiles = expert, place, jnp.ones_like(expert)
  return _tiled_products(rows, experts, tiles, _ROWS[0], interpret, False)


def _products(
  rows: Float[Array, 'A _'],
  experts: Float[Array, 'X D F'],
  sizes: Int[Array, 'X'],
  interpret: bool,
  is_transposed: bool,
):
  num_rows, num_experts = len(rows), len(experts)
  tile = _tile_rows(num_rows, num_experts)
  num_tiles = num_rows // tile + min(num_experts, num_rows)
  tiles = _tiles(sizes, tile, num_tiles)
  out = _tiled_products(rows, experts, tiles, tile, interpret, is_transposed)
  # Nothing was written to rows of no expert.
  return jnp.where(jnp.arange(num_rows)[:, None] < sizes.sum(), out, 0)


def _tiled_products(
  rows: Float[Array, 'A _'],
  experts: Float[Array, 'X D F'],
  tiles: tuple[jax.Array, jax.Array, jax.Array],
  tile: int,
  interpret: bool,
  is_transposed: bool,
):
  depth, width = experts.shape[1:]
  if is_transposed:
    depth, width = width, depth
  num_tiles = len(tiles[0])
  columns = _most_columns(num_tiles, width)

  def kernel(
    rows_ref: jax.Ref,
    experts_ref: jax.Ref,
    expert_ref: jax.Ref,
    first_ref: jax.Ref,
    count_ref: jax.Ref,
    out: jax.Ref,
  ):
    at, column = pl.program_id(0), pl.program_id(1) * columns
    count = count_ref[at]

    @pl.when(count > 0)
    def _():
      x, first = expert_ref[at], first_ref[at]
      is_own = jnp.arange(tile) < count
      in_width = column + jnp.arange(columns) < width

      def add(i: Int[Array, ''], total: Float[Array, 't f']):
        in_depth = i * _DEPTH + jnp.arange(_DEPTH) < depth
        depths = pl.ds(i * _DEPTH, _DEPTH)
        part = triton.load(
          rows_ref.at[pl.ds(first, tile), depths],
          mask=is_own[:, None] & in_depth[None],
          other=0,
        )
        across = pl.ds(column, columns)
        place = (across, depths) if is_transposed else (depths, across)
        inside = in_depth[:, None] & in_width[None]
        matrix = triton.load(
          experts_ref.at[x, *place],
          mask=inside.T if is_transposed else inside,
          other=0,
        )
        return total + dot(part, matrix.astype(part.dtype), is_transposed)

      total = jnp.zeros((tile, columns), jnp.float32)
      total = jax.lax.fori_loop(0, pl.cdiv(depth, _DEPTH), add, total)
      triton.store(
        out.at[pl.ds(first, tile), pl.ds(column, columns)],
        total.astype(out.dtype),
        mask=is_own[:, None] & in_width[None],
      )

  return pl.pallas_call(
    kernel,
    grid=(num_tiles, pl.cdiv(width, columns)),
    out_shape=_like(rows, (len(rows), width), rows.dtype),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=4),
    interpret=interpret,
    name='grouped_matmul',
  )(rows, experts, *tiles)


def _outer_products(
  rows: Float[Array, 'A D'],
  cotangent: Float[Array, 'A F'],
  sizes: Int[Array, 'X'],
  dtype: jax.typing.DTypeLike,
  interpret: bool,
):
  """The sum over each expert's rows of row^T @ cotangent: [X, D, F]."""
  depth, width = rows.shape[1], cotangent.shape[1]
  shape = (len(sizes), depth, width)
  tile = max(32, _tile_rows(len(rows), len(sizes)))
  first = jnp.cumsum(sizes) - sizes

  def kernel(
    rows_ref: jax.Ref,
    cotangent_ref: jax.Ref,
    first_ref: jax.Ref,
    size_ref: jax.Ref,
    out: jax.Ref,
  ):
    x = pl.program_id(0)
    row, column = pl.program_id(1) * _DEPTH, pl.program_id(2) * _COLUMNS
    in_depth = row + jnp.arange(_DEPTH) < depth
    in_width = column + jnp.arange(_COLUMNS) < width
    size = size_ref[x]

    def add(i: Int[Array, ''], total: Float[Array, 't f']):
      places = pl.ds(first_ref[x] + i * tile, tile)
      is_own = i * tile + jnp.arange(tile) < size

      def load(
        ref: jax.Ref,
        begin: Int[Array, ''],
        length: int,
        inside: Bool[Array, 'n'],
      ):
        return triton.load(
          ref.at[places, pl.ds(begin, length)],
          mask=is_own[:, None] & inside[None],
          other=0,
        )

      left = load(rows_ref, row, _DEPTH, in_depth)
      right = load(cotangent_ref, column, _COLUMNS, in_width)
      return total + dot(left.T, right)

    total = jnp.zeros((_DEPTH, _COLUMNS), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(size, tile), add, total)
    triton.store(
      out.at[x, pl.ds(row, _DEPTH), pl.ds(column, _COLUMNS)],
      total.astype(out.dtype),
      mask=in_depth[:, None] & in_width[None],
    )

  return pl.pallas_call(
    kernel,
    grid=(shape[0], pl.cdiv(depth, _DEPTH), pl.cdiv(width, _COLUMNS)),
    out_shape=_like(rows, shape, dtype),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
    interpret=interpret,
    name='grouped_outer_products',
  )(rows, cotangent, first, sizes)


def _tile_rows(num_rows: int, num_experts: int):
  """Rows of a tile: an expert's mean, up to a power of two."""
  mean = pl.cdiv(num_rows, num_experts)
  least, most = _ROWS
  return max(least, min(most, pl.next_power_of_2(mean)))


def _most_columns(num_tiles: int, width: int):
  """Columns of a tile, fewer where programs would not fill a GPU."""
  columns = _COLUMNS
  while columns > _LEAST_COLUMNS and (
    num_tiles * pl.cdiv(width, columns) < _PROGRAMS
  ):
    columns //= 2
  return columns


def _tiles(sizes: Int[Array, 'X'], tile: int, num_tiles: int):
  """Each tile's expert, first row and number of rows, 0 for unused tiles."""
  tiles_of = (sizes + tile - 1) // tile
  ends = jnp.cumsum(tiles_of)
  at = jnp.arange(num_tiles, dtype=sizes.dtype)
  expert = (ends[None] <= at[:, None]).sum(1, dtype=sizes.dtype)
  is_used = expert < len(sizes)
  expert = jnp.minimum(expert, len(sizes) - 1)
  before = (at - (ends - tiles_of)[expert]) * tile
  first = (jnp.cumsum(sizes) - sizes)[expert] + before
  count = jnp.where(is_used, jnp.minimum(tile, sizes[expert] - before), 0)
  return expert, first, count


def _like(x: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike):
  """A result that varies over the mesh axes over which `x` does."""
  return jax.ShapeDtypeStruct(
    shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type
  )
