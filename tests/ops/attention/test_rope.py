# SPDX-License-Identifier: Apache-2.0
"""RoPE against complex rotation, and that it only knows differences."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.ops.attention.rope import apply_rope, apply_rope_reference

KEY = jax.random.key(0)


def test_equals_the_complex_rotation():
  x = jax.random.normal(KEY, (2, 5, 3, 8))
  positions = jnp.array([[0, 1, 2, 3, 4], [7, 0, 1, 90, 5]])
  np.testing.assert_allclose(
    apply_rope(x, positions, 100.0),
    jax.jit(apply_rope_reference)(x, positions, 100.0),
    atol=1e-5,
  )


def test_scores_depend_on_differences_only():
  query, key = jax.random.normal(KEY, (2, 1, 4, 1, 16))
  positions = jnp.array([[0, 1, 5, 9]])

  @jax.jit
  def scores(positions):
    rotated = (apply_rope(x, positions) for x in (query, key))
    return jnp.einsum('btnh,bsnh->bts', *rotated)

  expected = scores(positions)
  np.testing.assert_allclose(scores(positions + 37), expected, atol=1e-4)
  assert np.abs(scores(0 * positions) - expected).max() > 1


def test_position_zero_is_left_alone():
  x = jax.random.normal(KEY, (1, 3, 2, 4), jnp.bfloat16)
  y = apply_rope(x, jnp.zeros((1, 3), jnp.int32))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(x, y)
