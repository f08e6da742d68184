# SPDX-License-Identifier: Apache-2.0
"""Products of rows with the matrices of their experts.

  out[s] = rows[s] @ experts[expert of s]

A mixture's cost at a small batch is reading weights, so only the matrices of
experts that have rows are read. XLA offers no such product: `lax.ragged_dot`
multiplies with all experts on CUDA, and reads them all. GPUs and TPUs have
kernels for it; on TPUs `lax.ragged_dot` is one, too, but for the gradient of
the matrices, which is summed here by a loop. Elsewhere a loop whose trip count
is the number of experts in use cuts out one matrix at a time and multiplies it
with its rows, tile by tile; on a CPU those of experts with few rows are in
`cpu`.

Sums are in f32 (f64 for f64). Matrices may be stored in another type than the
rows': the loop casts them after the cut, never all of them; the others must.

Letters: A rows, one for each assignment, X experts, D and F widths.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.config.errors import UserError
from jaxsparse.ops import chunking
from jaxsparse.ops.experts import cpu
from jaxsparse.ops.experts import grouped_matmul_libraries as libraries
from jaxsparse.ops.experts.loops import (
  Experts,
  item,
  over_experts,
  over_tiles,
  tile_rows,
  write_products,
)
from jaxsparse.ops.kernels import grouped_matmul as kernel
from jaxsparse.ops.quantized_matrix import QuantizedMatrix
from jaxsparse.ops.shard_map_vma import match_vma

IMPLEMENTATIONS = ('auto', 'loop', 'triton', 'megablox', 'ragged_dot')

_KERNELS = dict(gpu='triton', tpu='megablox')


def grouped_matmul(
  rows: Float[Array, 'A D'],
  experts: Experts,
  sizes: Int[Array, 'X'],
  *,
  implementation: str = 'auto',
  is_steady: bool = False,
) -> Float[Array, 'A F']:
  """Products of rows that are sorted by expert.

  Args:
    rows: those of expert 0 first.
    experts: a matrix for each. Quantized ones are turned into numbers one by
      one on a CPU, for which they are read as they are; elsewhere all are,
      before.
    sizes: rows of each expert, together at most A. What rows beyond hold is of
      no influence; they give zero.
    implementation: 'loop' as above; 'triton', our kernel for GPUs;
      'megablox', JAX's for TPUs; 'ragged_dot' of `jax.lax`; 'auto' is a kernel
      where one compiles, 'ragged_dot' on TPUs where none does, as Megablox does
      not know meshes, and the loop elsewhere.
    is_steady: a row's product has the same bits whatever the other rows are; by
      the loop without a gradient, and on a CPU slower where experts have many.

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
  if isinstance(experts, QuantizedMatrix) and mesh.platform() != 'cpu':
    experts = experts.dequantized(rows.dtype)
  if implementation == 'auto':
    platform = mesh.platform()
    implementation = _KERNELS.get(platform, 'loop')
    if implementation != 'loop' and libraries.unsupported_reason(
      implementation, rows, experts
    ):
      implementation = 'ragged_dot' if platform == 'tpu' else 'loop'
  elif implementation in _KERNELS.values() and (
    why := libraries.unsupported_reason(implementation, rows, experts)
  ):
    raise UserError(
      f"implementation = {implementation!r} can't run here: {why}."
    )
  rows, experts, sizes = match_vma(rows, experts, sizes)
  return dict(
    loop=functools.partial(_products, is_steady=True) if is_steady else _loop,
    triton=libraries.triton,
    megablox=libraries.megablox,
    ragged_dot=_ragged,
  )[implementation](rows, experts, sizes)


def grouped_matmul_reference(
  rows: Float[Array, 'A D'],
  experts: Float[Array, 'X D F'],
  sizes: Int[Array, 'X'],
) -> Float[Array, 'A F']:
  """`grouped_matmul` by all rows times all experts."""
  ends = jnp.cumsum(sizes)[None]
  place = jnp.arange(len(rows))[:, None]
  is_own = (place >= ends - sizes[None]) & (place < ends)
  products = jnp.einsum('sd,xdf->sxf', rows, experts.astype(rows.dtype))
  return jnp.where(is_own[..., None], products, 0).sum(1)


def assigned_matmul(
  rows: Float[Array, 'A D'],
  experts: Experts,
  expert: Int[Array, 'A'],
) -> Float[Array, 'A F']:
  """Products of a few rows in any order, each with the matrix of its `expert`.

  For decoding: nothing is sorted, and a matrix is read once for each of its
  rows. X stands for no expert: its rows' products are 0 on a CPU, for which
  nothing is read, and elsewhere those of the last expert.

  Returns:
    The products in the type of `rows`.
  """
  return _assigned(*match_vma(rows, experts, expert))


def assigned_matmul_reference(
  rows: Float[Array, 'A D'],
  experts: Float[Array, 'X D F'],
  expert: Int[Array, 'A'],
) -> Float[Array, 'A F']:
  """`assigned_matmul` by gathering a matrix for each row."""
  return jnp.einsum('sd,sdf->sf', rows, experts[expert].astype(rows.dtype))


@jax.custom_vjp
def _loop(rows, experts, sizes):
  return _products(rows, experts, sizes)


def _loop_backward(inputs, cotangent):
  rows, experts, sizes = inputs
  # Two programs: one that is not needed is dead code.
  d_rows = _products(cotangent, experts, sizes, is_transposed=True)
  if isinstance(experts, QuantizedMatrix):
    return d_rows, None, None
  return d_rows, _outer_products(rows, cotangent, sizes, experts.dtype), None


_loop.defvjp(lambda *inputs: (_loop(*inputs), inputs), _loop_backward)


@jax.custom_vjp
def _ragged(rows, experts, sizes):
  return libraries.ragged_dot(rows, experts, sizes)


def _ragged_backward(inputs, cotangent):
  rows, experts, sizes = inputs
  d_rows = libraries.ragged_dot(cotangent, experts, sizes, is_transposed=True)
  return d_rows, _outer_products(rows, cotangent, sizes, experts.dtype), None


_ragged.defvjp(lambda *inputs: (_ragged(*inputs), inputs), _ragged_backward)


# Compiled as functions of their own: layers of one size share a trace.
@functools.partial(jax.jit, static_argnames=('is_transposed', 'is_steady'))
def _products(rows, experts, sizes, is_transposed=False, is_steady=False):
  if rows.size == 0 or experts.size == 0:
    width = experts.shape[1 if is_transposed else 2]
    return chunking.zeros((len(rows), width), rows.dtype, rows)

  by_dots = functools.partial(_by_dots, is_transposed=is_transposed)

  def on_cpu(rows, experts, sizes):
    few = cpu.few_rows(rows, experts, sizes, is_steady)
    return few[0] if is_steady else by_dots(rows, experts, sizes, *few)

  return jax.lax.platform_dependent(
    rows, experts, sizes,
    # A transposed matrix is summed along its rows, which does not vectorize.
    cpu=by_dots if is_transposed else on_cpu,
    default=by_dots,
  )  # fmt: skip


def _by_dots(
  rows, experts, sizes, out=None, is_left=None, *, is_transposed=False
):
  """Of the experts that are left, or of all; to `out`, if it is there."""
  dtype = chunking.accumulator(rows)
  if out is None:
    width = experts.shape[1 if is_transposed else 2]
    out = chunking.zeros((len(rows), width), rows.dtype, rows, experts)
    is_left = sizes > 0

  def dot(expert):
    if isinstance(experts, QuantizedMatrix):
      matrix = _matrices(experts, expert[None])[0]
    else:
      matrix = item(*chunking.read_in_place(experts, expert))
    matrix = matrix.astype(rows.dtype)
    dims = ((1,), (1 if is_transposed else 0,)), ((), ())
    return lambda part: jax.lax.dot_general(
      part, matrix, dims, preferred_element_type=dtype
    )

  tile = tile_rows(len(rows), len(experts))
  return write_products(dot, rows, sizes, tile, is_left, out)


@functools.partial(jax.jit, static_argnames='out_dtype')
def _outer_products(rows, cotangent, sizes, out_dtype):
  """The sum over each expert's rows of row^T @ cotangent: [X, D, F]."""
  shape = (len(sizes), rows.shape[1], cotangent.shape[1])
  dtype = chunking.accumulator(rows)
  out = chunking.zeros(shape, out_dtype, rows, cotangent)
  if rows.size == 0 or out.size == 0:
    return out
  tile, ends = tile_rows(len(rows), len(sizes)), jnp.cumsum(sizes)

  def add(expert, out):
    def add_tile(at, is_own, total):
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


@jax.custom_vjp
def _assigned(rows, experts, expert):
  return _assigned_products(rows, experts, expert)


@jax.jit
def _assigned_products(rows, experts, expert):
  dtype = chunking.accumulator(rows)
  in_range = jnp.minimum(expert, len(experts) - 1)

  def fused(rows, experts, expert):
    # A sum of products fuses with the gather; a dot would need its result.
    matrices = _matrices(experts, expert).astype(rows.dtype)
    products = rows[..., None].astype(dtype) * matrices.astype(dtype)
    return products.sum(1).astype(rows.dtype)

  is_quantized = isinstance(experts, QuantizedMatrix)
  if (
    mesh.platform() == 'gpu'
    and not is_quantized
    and not libraries.unsupported_reason('triton', rows, experts)
  ):
    return kernel.assigned_matmul(rows, experts, in_range)
  return jax.lax.platform_dependent(
    rows,
    experts,
    expert,
    in_range,
    cpu=lambda rows, experts, expert, _: cpu.one_by_one(rows, experts, expert),
    default=lambda rows, experts, _, in_range: fused(rows, experts, in_range),
  )


def _matrices(experts: Experts, expert: Int[Array, 'A']):
  """A matrix for each row."""
  if isinstance(experts, QuantizedMatrix):
    return experts.read(lambda x: chunking.rows(x, expert))
  return chunking.rows(experts, expert)


def _assigned_backward(inputs, cotangent):
  rows, experts, expert = inputs
  dtype = chunking.accumulator(rows)
  d_rows = jnp.einsum(
    'sf,sdf->sd',
    cotangent,
    _matrices(experts, expert).astype(rows.dtype),
    preferred_element_type=dtype,
  )
  if isinstance(experts, QuantizedMatrix):
    return d_rows.astype(rows.dtype), None, None
  products = rows[:, :, None].astype(dtype) * cotangent[:, None].astype(dtype)
  d_experts = chunking.zeros(experts.shape, dtype, rows, experts)
  d_experts = d_experts.at[expert].add(products, mode='promise_in_bounds')
  return d_rows.astype(rows.dtype), d_experts.astype(experts.dtype), None


_assigned.defvjp(
  lambda *inputs: (_assigned(*inputs), inputs), _assigned_backward
)
