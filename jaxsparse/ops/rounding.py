# SPDX-License-Identifier: Apache-2.0
"""4-bit codes that leave a matrix's products nearly as they are, by GPTQ.

Plain rounding makes the error of a matrix small. What counts is the error of
its products with inputs, and those of a model are correlated: what one number
is rounded by can be made up for by the numbers after it. GPTQ (Frantar et al.,
arXiv:2210.17323) rounds input by input; the error of each is spread over what
is left by the inverse of the inputs' second moments, of which a Cholesky factor
holds all that is asked for.

Letters: I inputs, O outputs of a matrix, g inputs of a group.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from jaxsparse.ops.quantized_matrix import to_codes

# Added to the diagonal, of its mean: what the text has no say in is left alone.
_DAMPING = 0.01


@jax.jit(static_argnums=2)
def round_by_inputs(
  matrix: Float[Array, 'I O'], moments: Float[Array, 'I I'], group: int
) -> tuple[Int8[Array, 'I O'], Float[Array, 'I/{group} O']]:
  """Codes in -7 .. 7, and a scale for each group of inputs.

  Args:
    matrix: of a product with inputs [.., I].
    moments: the sum of inputs times inputs.
    group: inputs with one scale, a divisor of I.
  """
  factor = _factor(moments)
  num_inputs, num_outputs = matrix.shape
  inputs = jnp.arange(num_inputs)

  def on_group(i, state):
    matrix, codes, scales = state
    begin = i * group
    part = jax.lax.dynamic_slice_in_dim(matrix, begin, group)
    factors = jax.lax.dynamic_slice_in_dim(factor, begin, group)
    own = jax.lax.dynamic_slice_in_dim(factors, begin, group, axis=1)
    scale = jnp.abs(part).max(0) / 7

    def on_input(j, state):
      part, found, errors = state
      code = to_codes(part[j], scale, 7)
      error = (part[j] - code * scale) / own[j, j]
      # Rows before stay as they are: the factor is 0 there, but for the own.
      after = jnp.where(jnp.arange(group) > j, own[j], 0)
      part -= after[:, None] * error[None]
      return part, found.at[j].set(code), errors.at[j].set(error)

    zeros = jnp.zeros_like(part)
    _, found, errors = jax.lax.fori_loop(
      0, group, on_input, (part, zeros, zeros)
    )
    later = jnp.where(inputs[None] >= begin + group, factors, 0)
    matrix -= later.T @ errors
    codes = jax.lax.dynamic_update_slice_in_dim(codes, found, begin, axis=0)
    return matrix, codes, scales.at[i].set(scale)

  scales = jnp.zeros((num_inputs // group, num_outputs))
  state = matrix.astype(jnp.float32), jnp.zeros(matrix.shape), scales
  _, codes, scales = jax.lax.fori_loop(0, num_inputs // group, on_group, state)
  return codes.astype(jnp.int8), scales


def _factor(moments: Float[Array, 'I I']) -> Float[Array, 'I I']:
  """The upper Cholesky factor of the inverse."""
  mean = jnp.diag(moments).mean()
  # Inputs that are always 0 have no say either.
  damped = moments + jnp.eye(len(moments)) * (_DAMPING * mean + 1e-30)
  scale = jax.lax.rsqrt(jnp.diag(damped))
  identity = jnp.eye(len(moments))
  lower = jnp.linalg.cholesky(damped * scale[:, None] * scale[None])
  half = jax.scipy.linalg.solve_triangular(lower, identity, lower=True)
  inverse = half.T @ half * scale[:, None] * scale[None]
  return jnp.linalg.cholesky(inverse).T


def round_by_inputs_reference(
  matrix: np.ndarray, moments: np.ndarray, group: int
) -> tuple[np.ndarray, np.ndarray]:
  """`round_by_inputs` by an inverse for the inputs that are left, each time."""
  left = matrix.astype(np.float64)
  moments = moments.astype(np.float64)
  moments = moments + np.eye(len(moments)) * (
    _DAMPING * np.diag(moments).mean()
  )
  codes, scales = np.zeros(matrix.shape), []
  for i in range(len(matrix)):
    if i % group == 0:
      scales.append(np.abs(left[i : i + group]).max(0) / 7)
    ratio = left[i] / np.where(scales[-1] == 0, 1, scales[-1])
    codes[i] = np.clip(np.round(ratio), -7, 7)
    inverse = np.linalg.inv(moments[i:, i:])
    error = (left[i] - codes[i] * scales[-1]) / inverse[0, 0]
    left[i:] -= inverse[0][:, None] * error[None]
  return codes.astype(np.int8), np.array(scales)
