# SPDX-License-Identifier: Apache-2.0
"""The MLPs of a mixture's experts for a few tokens, in two Triton kernels.

Sorting assignments by expert, gathering their rows and putting results back in
order is more launches than products. Here nothing is sorted: each program has
an expert and a tile of columns, finds the expert's assignments by counting, and
reads their rows where they lie; the activation is in the first kernel and the
weights in the second. Experts without assignments are not read, and those with
up to 16 are read once.

Sums are in f32.

Letters: T tokens, k experts of a token, A = T * k assignments, X experts, D
model width, F inner width.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from jaxsparse.ops.adapted_matrix import AdaptedMatrix
from jaxsparse.ops.kernels import probe
from jaxsparse.ops.kernels.tile_product import dot
from jaxsparse.ops.quantized_matrix import QuantizedMatrix

# Rows of a tile, as many as tensor cores want, and as an expert may have on
# average: the matrix of one with more is read again.
_ROWS = 16
# Assignments, whose experts every program reads.
_MOST_ASSIGNMENTS = 1024
# Columns of a tile and elements of a sum at once: at most, and at least.
_COLUMNS, _DEPTH, _LEAST = 64, 64, 16
# Positions are 32 bits wide.
_MOST_ELEMENTS = 2**31 - 1

Matrices = Mapping[str, jax.Array | QuantizedMatrix | AdaptedMatrix]


def unsupported_reason(
  x: Float[Array, 'T D'],
  weights: Float[Array, 'T k'],
  experts: Int[Array, 'T k'],
  matrices: Matrices,
  gelu: str = 'tanh',
) -> str | None:
  """What keeps the kernels from serving such a call here, in words."""
  return _unserved(x, experts, matrices) or probe.unsupported_reason(
    expert_mlp, x, weights, experts, dict(matrices), gelu=gelu
  )


def _unserved(
  x: Float[Array, 'T D'], experts: Int[Array, 'T k'], matrices: Matrices
):
  num, most = experts.size, min(_MOST_ASSIGNMENTS, _ROWS * len(matrices['up']))
  if not 0 < num <= most:
    return f'{num} assignments are not 1 to {most}'
  if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    return f'it takes 16 or 32 bits and not {x.dtype}'
  for name, matrix in matrices.items():
    if isinstance(matrix, QuantizedMatrix):
      return f'{name} is quantized'
    if isinstance(matrix, AdaptedMatrix):
      return f'{name} has an adapter'
    if matrix.size > _MOST_ELEMENTS:
      return f'{matrix.size} elements of {name} are not below 2^31'
    for size in matrix.shape[1:]:
      if size % _LEAST:
        return f'widths must be multiples of {_LEAST}, and {name} has {size}'
  return None


def expert_mlp(
  x: Float[Array, 'T D'],
  weights: Float[Array, 'T k'],
  experts: Int[Array, 'T k'],
  matrices: Matrices,
  *,
  gelu: str = 'tanh',
  interpret: bool = False,
) -> Float[Array, 'T D']:
  """`ops.experts.expert_mlp.expert_mlp` on a GPU, without a gradient.

  Args:
    x: inputs, in the type of the products.
    weights: of each token's experts.
    experts: their numbers; X for none, which adds nothing.
    matrices: 'up' [X, D, F] and 'down' [X, F, D], and 'gate' [X, D, F] for
      SwiGLU; in any float type.
    gelu: its form, 'tanh' or 'erf'.
    interpret: run in Pallas interpret mode (tests).

  Returns:
    The weighted sums in f32.
  """
  num_experts, per_token = len(matrices['up']), experts.shape[1]
  inputs = [matrices[name] for name in ('up', 'gate') if name in matrices]

  def activate(up: jax.Array, gate: jax.Array | None = None):
    if gate is not None:
      return jax.nn.silu(gate) * up
    return jax.nn.gelu(up, approximate=gelu == 'tanh')

  hidden = _products(
    x, experts, inputs, per_token, activate, x.dtype, interpret
  )
  rows = _products(
    hidden, experts, [matrices['down']], 1, None, jnp.float32, interpret
  )
  # Nothing was written to rows of no expert.
  is_some = (experts < num_experts)[..., None]
  rows = rows.reshape(*experts.shape, -1) * weights[..., None]
  return jnp.where(is_some, rows, 0).sum(1)


def _products(
  rows: Float[Array, 'R D'],
  experts: Int[Array, 'T k'],
  matrices: Sequence[jax.Array],
  per_row: int,
  activate: Callable | None,
  dtype: jax.typing.DTypeLike,
  interpret: bool,
):
  """Of each assignment's row, one of `per_row` of that row, [A, width]."""
  num_experts, depth, width = matrices[0].shape
  columns, step = _divisor(width, _COLUMNS), _divisor(depth, _DEPTH)
  num = experts.size

  def kernel(rows_ref: jax.Ref, expert_ref: jax.Ref, *refs: jax.Ref):
    *matrix_refs, out = refs
    x, column = pl.program_id(0), pl.program_id(1) * columns
    lane = jnp.arange(pl.next_power_of_2(num))
    expert = triton.load(
      expert_ref.at[lane], mask=lane < num, other=num_experts
    )
    is_own = expert == x
    place = jnp.cumsum(is_own.astype(jnp.int32)) - 1
    count = is_own.astype(jnp.int32).sum()
    across = column + jnp.arange(columns)

    def multiply(i: Int[Array, ''], carry: None):
      wanted = i * _ROWS + jnp.arange(_ROWS)
      # Lanes beyond the last assignment repeat it.
      wanted = jnp.minimum(wanted, count - 1)
      is_it = is_own[None] & (place[None] == wanted[:, None])
      at = jnp.where(is_it, lane[None], 0).sum(1)

      def add(j: Int[Array, ''], totals: tuple[jax.Array, ...]):
        along = j * step + jnp.arange(step)
        part = triton.load(rows_ref.at[(at // per_row)[:, None], along[None]])
        return tuple(
          total
          + dot(
            part,
            triton.load(ref.at[x, along[:, None], across[None]]).astype(
              part.dtype
            ),
          )
          for ref, total in zip(matrix_refs, totals, strict=True)
        )

      zeros = jnp.zeros((_ROWS, columns), jnp.float32)
      totals = jax.lax.fori_loop(
        0, depth // step, add, (zeros,) * len(matrix_refs)
      )
      y = totals[0] if activate is None else activate(*totals)
      triton.store(out.at[at[:, None], across[None]], y.astype(dtype))
      return carry

    jax.lax.fori_loop(0, pl.cdiv(count, _ROWS), multiply, None)

  return pl.pallas_call(
    kernel,
    grid=(num_experts, width // columns),
    out_shape=jax.ShapeDtypeStruct(
      (num, width), dtype, manual_axis_type=jax.typeof(rows).manual_axis_type
    ),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=4),
    interpret=interpret,
    name='few_experts',
  )(rows, experts.reshape(-1), *matrices)


def _divisor(size: int, most: int):
  """The largest power of two that divides a size, up to `most`."""
  return min(most, size & -size)
