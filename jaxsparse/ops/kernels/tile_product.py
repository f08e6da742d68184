# SPDX-License-Identifier: Apache-2.0
"""A product of two tiles in a Triton kernel."""

import jax
import jax.numpy as jnp


def dot(
  left: jax.Array, right: jax.Array, is_transposed: bool = False
) -> jax.Array:
  """left @ right, or left @ right.T, in f32; f32 is not rounded to less."""
  is_wide = left.dtype == jnp.float32
  return jax.lax.dot_general(
    left,
    right,
    (((1,), (1 if is_transposed else 0,)), ((), ())),
    jax.lax.Precision.HIGHEST if is_wide else None,
    preferred_element_type=jnp.float32,
  )
