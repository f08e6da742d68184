"""Products of rows with the matrices of their experts.

  out[s] = rows[s] @ experts[expert of s]

A mixture's cost at a small batch is reading weights, so only the matrices of
experts that have rows are read. XLA offers no such product: `lax.ragged_dot`
multiplies with all experts on CUDA, and reads them all. GPUs and TPUs have
kernels for it; on TPUs `lax.ragged_dot` is one, too, but for the gradient of
the matrices, which is summed here by a loop. Elsewhere a loop whose trip count
is the number of experts in use cuts out one matrix at a time and multiplies it
with its rows, tile by tile. On a CPU that costs a copy of the matrix, as dots
there take whole buffers; for an expert with few rows the sum of scaled matrix
rows is written out instead, which XLA fuses with the cut.

Sums are in f32 (f64 for f64). Matrices may be stored in another type than the
rows': the loop casts them after the cut, never all of them; the others must.

Letters: S rows, X experts, D and F widths.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxsparse.config.errors import UserError
from jaxsparse.ops import chunking
from jaxsparse.ops.experts import grouped_matmul_libraries as libraries
from jaxsparse.ops.experts.loops import over_experts, over_tiles, tile_rows
from jaxsparse.ops.kernels import grouped_matmul as kernel
from jaxsparse.ops.shard_map_vma import to_same_varying

IMPLEMENTATIONS = ('auto', 'loop', 'triton', 'megablox', 'ragged_dot')

_KERNELS = dict(gpu='triton', tpu='megablox')

# On a CPU, experts with up to so many rows are multiplied without a copy, so
# many rows at once.
_FEW_ROWS_CPU = {1: 1, 8: 4}

# Elements of a matrix that one fused kernel of a CPU adds up.
_FUSED_ELEMENTS_CPU = 2**13

_Rows = Float[Array, 'S D']
_Experts = Float[Array, 'X D F']
_Sizes = Int[Array, 'X']
_Products = Float[Array, 'S F']
_Index = Int[Array, '']
_Inputs = tuple[jax.Array, jax.Array, jax.Array]


def grouped_matmul(
  rows: Float[Array, 'S D'],
  experts: Float[Array, 'X D F'],
  sizes: Int[Array, 'X'],
  *,
  implementation: str = 'auto',
) -> Float[Array, 'S F']:
  """Products of rows that are sorted by expert.

  Args:
    rows: those of expert 0 first.
    experts: a matrix for each.
    sizes: rows of each expert, together at most S. What rows beyond hold is of
      no influence; they give zero.
    implementation: 'loop' as told above; 'triton', our kernel for GPUs;
      'megablox', JAX's for TPUs; 'ragged_dot' of `jax.lax`; 'auto' is a kernel
      where one compiles, 'ragged_dot' on TPUs where none does, as Megablox does
      not know meshes, and the loop elsewhere.

  Returns:
    The products in the type of `rows`.

  Raises:
    UserError: `implementation` is unknown or can't run here.
  """
  if implementation not in IMPLEMENTATIONS:
    raise UserError(
      f'implementation = {implementation!r} must be one of '
      f'{", ".join(map(repr, IMPLEMENTATIONS))}.'
    )
  if implementation == 'auto':
    platform = jax.default_backend()
    implementation = _KERNELS.get(platform, 'loop')
    if implementation != 'loop' and libraries.why_not(
      implementation, rows, experts
    ):
      implementation = 'ragged_dot' if platform == 'tpu' else 'loop'
  elif implementation in _KERNELS.values() and (
    why := libraries.why_not(implementation, rows, experts)
  ):
    raise UserError(
      f"implementation = {implementation!r} can't run here: {why}."
    )
  rows, experts, sizes = to_same_varying(rows, experts, sizes)
  return dict(
    loop=_loop,
    triton=libraries.triton,
    megablox=libraries.megablox,
    ragged_dot=_ragged,
  )[implementation](rows, experts, sizes)


def grouped_matmul_reference(
  rows: Float[Array, 'S D'],
  experts: Float[Array, 'X D F'],
  sizes: Int[Array, 'X'],
) -> Float[Array, 'S F']:
  """`grouped_matmul` by all rows times all experts."""
  ends = jnp.cumsum(sizes)[None]
  place = jnp.arange(len(rows))[:, None]
  is_own = (place >= ends - sizes[None]) & (place < ends)
  products = jnp.einsum('sd,xdf->sxf', rows, experts.astype(rows.dtype))
  return jnp.where(is_own[..., None], products, 0).sum(1)


def assigned_matmul(
  rows: Float[Array, 'S D'],
  experts: Float[Array, 'X D F'],
  expert: Int[Array, 'S'],
) -> Float[Array, 'S F']:
  """Products of a few rows in any order, each with the matrix of its `expert`.

  For decoding: nothing is sorted, and a matrix is read once for each of its
  rows. Numbers of experts must be in range.

  Returns:
    The products in the type of `rows`.
  """
  return _assigned(*to_same_varying(rows, experts, expert))


def assigned_matmul_reference(
  rows: Float[Array, 'S D'],
  experts: Float[Array, 'X D F'],
  expert: Int[Array, 'S'],
) -> Float[Array, 'S F']:
  """`assigned_matmul` by gathering a matrix for each row."""
  return jnp.einsum('sd,sdf->sf', rows, experts[expert].astype(rows.dtype))


@jax.custom_vjp
def _loop(rows: _Rows, experts: _Experts, sizes: _Sizes):
  return _products(rows, experts, sizes)


def _loop_backward(inputs: _Inputs, cotangent: _Products):
  rows, experts, sizes = inputs
  # Two programs, so that one that nobody asks for is dead code.
  d_rows = _products(cotangent, experts, sizes, is_transposed=True)
  return d_rows, _outer_products(rows, cotangent, sizes, experts.dtype), None


_loop.defvjp(lambda *inputs: (_loop(*inputs), inputs), _loop_backward)


@jax.custom_vjp
def _ragged(rows: _Rows, experts: _Experts, sizes: _Sizes):
  return libraries.ragged_dot(rows, experts, sizes)


def _ragged_backward(inputs: _Inputs, cotangent: _Products):
  rows, experts, sizes = inputs
  d_rows = libraries.ragged_dot(cotangent, experts, sizes, is_transposed=True)
  return d_rows, _outer_products(rows, cotangent, sizes, experts.dtype), None


_ragged.defvjp(lambda *inputs: (_ragged(*inputs), inputs), _ragged_backward)


# Compiled as functions of their own, so that layers of one size share a trace.
@functools.partial(jax.jit, static_argnames='is_transposed')
def _products(
  rows: Float[Array, 'S _'],
  experts: _Experts,
  sizes: _Sizes,
  is_transposed: bool = False,
):
  if rows.size == 0 or experts.size == 0:
    width = experts.shape[1 if is_transposed else 2]
    return chunking.zeros((len(rows), width), rows.dtype, rows)

  def with_few(few: dict[int, int]):
    return functools.partial(
      _products_with_few, few=few, is_transposed=is_transposed
    )

  return jax.lax.platform_dependent(
    rows, experts, sizes,
    # A transposed matrix is summed along its rows, which does not vectorize.
    cpu=with_few({} if is_transposed else _FEW_ROWS_CPU),
    default=with_few({}),
  )  # fmt: skip


def _products_with_few(
  rows: Float[Array, 'S _'],
  experts: _Experts,
  sizes: _Sizes,
  few: dict[int, int],
  is_transposed: bool,
):
  """A loop over experts with many rows, and one for each way to take `few`."""
  dtype = chunking.accumulator(rows)
  ends = jnp.cumsum(sizes)

  def dot(expert: _Index):
    matrix = _item(*chunking.read_in_place(experts, expert))
    matrix = matrix.astype(rows.dtype)
    dims = ((1,), (1 if is_transposed else 0,)), ((), ())
    return lambda part: jax.lax.dot_general(
      part, matrix, dims, preferred_element_type=dtype
    )

  def in_place(expert: _Index):
    return lambda part: _product_in_place(part, experts, expert)

  def multiply(
    product: Callable, tile: int, is_chosen: Bool[Array, 'X'], out: _Products
  ):
    def on_expert(expert: _Index, out: _Products):
      product_of = product(expert)

      def on_tile(at: _Index, is_own: Bool[Array, 't'], out: _Products):
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

  width = experts.shape[1 if is_transposed else 2]
  out = chunking.zeros((len(rows), width), rows.dtype, rows, experts)
  done = 0
  for most, tile in few.items():
    is_chosen = (sizes > done) & (sizes <= most)
    out = multiply(in_place, min(tile, len(rows)), is_chosen, out)
    done = most
  tile = tile_rows(len(rows), len(experts))
  return multiply(dot, tile, sizes > done, out)


@functools.partial(jax.jit, static_argnames='out_dtype')
def _outer_products(
  rows: _Rows,
  cotangent: _Products,
  sizes: _Sizes,
  out_dtype: jax.typing.DTypeLike,
):
  """The sum over each expert's rows of row^T @ cotangent: [X, D, F]."""
  shape = (len(sizes), rows.shape[1], cotangent.shape[1])
  dtype = chunking.accumulator(rows)
  out = chunking.zeros(shape, out_dtype, rows, cotangent)
  if rows.size == 0 or out.size == 0:
    return out
  tile, ends = tile_rows(len(rows), len(sizes)), jnp.cumsum(sizes)

  def add(expert: _Index, out: _Experts):
    def add_tile(
      at: _Index, is_own: Bool[Array, 't'], total: Float[Array, 'D F']
    ):
      part = jax.lax.dynamic_slice_in_dim(rows, at, tile)
      return total + jax.lax.dot_general(
        # Rows of other experts may hold anything, and so may their cotangents.
        jnp.where(is_own[:, None], part, 0),
        jnp.where(
          is_own[:, None],
          jax.lax.dynamic_slice_in_dim(cotangent, at, tile),
          0,
        ),
        (((0,), (0,)), ((), ())),
        preferred_element_type=dtype,
      )

    total = chunking.zeros(shape[1:], dtype, rows, cotangent)
    total = over_tiles(add_tile, expert, ends, sizes, tile, len(rows), total)
    return jax.lax.dynamic_update_index_in_dim(
      out, total.astype(out_dtype), expert, 0
    )

  return over_experts(add, sizes > 0, out)


def _item(x: Shaped[Array, 'N ...'], i: _Index):
  return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _product_in_place(rows: _Rows, experts: _Experts, expert: _Index):
  """rows @ experts[expert] for a few rows, the matrix read where it lies."""
  dtype = chunking.accumulator(rows)
  depth, width = experts.shape[1:]
  at_once = _FUSED_ELEMENTS_CPU // width
  at_once = math.gcd(depth, max(8, min(32, at_once)))
  flat = experts.reshape(-1, width)
  scales = rows.T.reshape(-1, at_once, len(rows)).astype(dtype)

  def add(i: _Index, total: _Products):
    scale = _item(scales, i)
    for j in range(at_once):
      place = expert * depth + i * at_once + j
      line = _item(*chunking.read_in_place(flat, place))
      line = line.astype(rows.dtype).astype(dtype)
      total += scale[j][:, None] * line[None]
    return total

  total = chunking.zeros((len(rows), width), dtype, rows, experts, expert)
  return jax.lax.fori_loop(0, depth // at_once, add, total)


@jax.custom_vjp
def _assigned(rows: _Rows, experts: _Experts, expert: Int[Array, 'S']):
  return _assigned_products(rows, experts, expert)


@jax.jit
def _assigned_products(rows: _Rows, experts: _Experts, expert: Int[Array, 'S']):
  dtype = chunking.accumulator(rows)

  def one_by_one(rows: _Rows, experts: _Experts, expert: Int[Array, 'S']):
    def add(i: _Index, out: _Products):
      row = jax.lax.dynamic_slice_in_dim(rows, i, 1)
      product = _product_in_place(row, experts, expert[i])
      return jax.lax.dynamic_update_slice_in_dim(
        out, product.astype(rows.dtype), i, 0
      )

    shape = (len(rows), experts.shape[2])
    out = chunking.zeros(shape, rows.dtype, rows, experts)
    return jax.lax.fori_loop(0, len(rows), add, out)

  def fused(rows: _Rows, experts: _Experts, expert: Int[Array, 'S']):
    # A sum of products fuses with the gather; a dot would need its result.
    matrices = chunking.rows(experts, expert).astype(rows.dtype)
    products = rows[..., None].astype(dtype) * matrices.astype(dtype)
    return products.sum(1).astype(rows.dtype)

  if jax.default_backend() == 'gpu' and not libraries.why_not(
    'triton', rows, experts
  ):
    return kernel.assigned_matmul(rows, experts, expert)
  return jax.lax.platform_dependent(
    rows, experts, expert, cpu=one_by_one, default=fused
  )


def _assigned_backward(inputs: _Inputs, cotangent: _Products):
  rows, experts, expert = inputs
  dtype = chunking.accumulator(rows)
  d_rows = jnp.einsum(
    'sf,sdf->sd',
    cotangent,
    chunking.rows(experts, expert).astype(rows.dtype),
    preferred_element_type=dtype,
  )
  products = rows[:, :, None].astype(dtype) * cotangent[:, None].astype(dtype)
  d_experts = chunking.zeros(experts.shape, dtype, rows, experts)
  d_experts = d_experts.at[expert].add(products, mode='promise_in_bounds')
  return d_rows.astype(rows.dtype), d_experts.astype(experts.dtype), None


_assigned.defvjp(
  lambda *inputs: (_assigned(*inputs), inputs), _assigned_backward
)
