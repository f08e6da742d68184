# SPDX-License-Identifier: Apache-2.0
"""RoPE against complex rotation, its differences, and scaled frequencies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.ops.attention.rope import (
  apply_rope,
  apply_rope_reference,
  linear_scaling,
  llama3_scaling,
)


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


# Of Llama 3.1's kind; what PyTorch's transformers makes of it for heads of 16.
LLAMA3 = functools.partial(
  llama3_scaling,
  factor=8.0,
  low_frequency_factor=1.0,
  high_frequency_factor=4.0,
  original_length=64,
)
GOLDEN = [
  1, 0.244384587, 0.0130422562, 0.00395284733, 0.00125, 0.000395284733,
  0.000125, 3.95284733e-5,
]  # fmt: skip


def frequencies(width=16, base=1e4):
  half = width // 2
  return (base ** (-np.arange(half) / half)).astype(np.float32)


def test_slow_frequencies_are_divided_as_llama3_does():
  scaled = LLAMA3(frequencies())
  np.testing.assert_allclose(scaled, GOLDEN, rtol=3e-6)


@pytest.mark.parametrize(('turns', 'stays'), [(4, 1), (2.5, 0.5), (1, 0)])
def test_between_is_a_straight_line_over_turns(turns, stays):
  """Turns within the length that was trained on: 64 positions."""
  frequency = np.array([2 * np.pi * turns / 64], np.float32)
  expected = frequency * (stays + (1 - stays) / 8)
  np.testing.assert_allclose(LLAMA3(frequency), expected, rtol=1e-6)


@pytest.mark.parametrize('width', [16, 8])
def test_scaled_frequencies_turn_the_pairs(width):
  """Those of the first coordinates alone, if the others are not rotated."""
  x = draw(1, 3, 2, 16)
  positions = np.array([[5, 90, 1000]], np.int32)

  @jax.jit
  def turned(x, positions):
    return apply_rope(x, positions, width=width, scaling=LLAMA3)

  y = np.asarray(turned(x, positions))
  scaled = np.asarray(LLAMA3(frequencies(width)), np.float64)
  half = width // 2
  z = x[..., :half] + 1j * x[..., half:width]
  z = z * np.exp(1j * positions[..., None, None] * scaled)
  np.testing.assert_allclose(
    y[..., :width], np.concatenate([z.real, z.imag], -1), atol=2e-4
  )
  np.testing.assert_array_equal(y[..., width:], x[..., width:])


def test_linear_scaling_divides_the_positions():
  x, positions = draw(1, 3, 2, 8), np.array([[4, 8, 400]], np.int32)
  scaling = functools.partial(linear_scaling, factor=4.0)

  @jax.jit
  def both(x, positions):
    scaled = apply_rope(x, positions, scaling=scaling)
    return scaled, apply_rope(x, positions // 4)

  np.testing.assert_allclose(*both(x, positions), atol=1e-5)
