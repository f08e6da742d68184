# SPDX-License-Identifier: Apache-2.0
"""RoPE against complex rotation, and that it only knows differences."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.ops.attention.rope import apply_rope, apply_rope_reference


def draw(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_equals_the_complex_rotation():
  positions = np.array([[0, 1, 2, 3, 4], [7, 0, 1, 90, 5]], np.int32)

  @jax.jit
  def both(x, positions):
    return (
      apply_rope(x, positions, 100.0),
      apply_rope_reference(x, positions, 100.0),
    )

  got, expected = both(draw(2, 5, 3, 8), positions)
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_scores_depend_on_differences_only():
  query, key = jax.device_put(tuple(draw(2, 1, 4, 1, 16)))
  positions = np.array([[0, 1, 5, 9]], np.int32)

  @jax.jit
  def scores(positions):
    rotated = (apply_rope(x, positions) for x in (query, key))
    return jnp.einsum('btnh,bsnh->bts', *rotated)

  expected = np.asarray(scores(positions))
  np.testing.assert_allclose(scores(positions + 37), expected, atol=1e-4)
  assert np.abs(scores(0 * positions) - expected).max() > 1


def test_position_zero_is_left_alone():
  x = draw(1, 3, 2, 4).astype(jnp.bfloat16)
  y = jax.jit(apply_rope)(x, np.zeros((1, 3), np.int32))
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(x, y)
