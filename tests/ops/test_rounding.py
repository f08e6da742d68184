# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np
import pytest

from jaxsparse.ops import quantized_matrix
from jaxsparse.ops.rounding import round_by_inputs, round_by_inputs_reference

RNG = np.random.default_rng(0)


def inputs(num_inputs, is_correlated=True):
  x = RNG.normal(size=(256, num_inputs))
  if is_correlated:
    x = x @ RNG.normal(size=(num_inputs, num_inputs)) + RNG.normal(size=256)[
      :, None
    ]  # fmt: skip
  return x.astype(np.float32)


def test_it_equals_an_inverse_for_each_input():
  x, matrix = inputs(24), RNG.normal(size=(24, 10)).astype(np.float32)
  moments = x.T @ x
  codes, scale = round_by_inputs(*jax.device_put((matrix, moments)), 8)
  expected, scales = round_by_inputs_reference(matrix, moments, 8)
  np.testing.assert_allclose(scale, scales, rtol=1e-3)
  # One number that lies between two codes changes all after it.
  assert np.mean(np.asarray(codes) == expected) > 0.98


def output_error(matrix, codes, scale, group, x):
  decoded = np.asarray(codes, np.float32) * np.repeat(scale, group, axis=0)
  return np.linalg.norm(x @ (decoded - matrix)) / np.linalg.norm(x @ matrix)


@pytest.mark.parametrize('is_correlated', [True, False])
def test_products_err_less_than_by_plain_rounding(is_correlated):
  x = inputs(64, is_correlated)
  matrix = RNG.normal(size=(64, 32)).astype(np.float32)
  on_device = jax.device_put(matrix)
  plain = quantized_matrix.encoded(on_device, 'int4', (0,), 32).dequantized()
  plain_error = np.linalg.norm(x @ (np.asarray(plain) - matrix))
  plain_error /= np.linalg.norm(x @ matrix)
  codes, scale = round_by_inputs(on_device, jax.device_put(x.T @ x), 32)
  error = output_error(matrix, codes, scale, 32, x)
  assert error < (0.8 if is_correlated else 1.0) * plain_error


def test_inputs_that_are_always_zero():
  x = inputs(16)
  x[:, 4:7] = 0
  matrix = RNG.normal(size=(16, 4)).astype(np.float32)
  codes, scale = round_by_inputs(*jax.device_put((matrix, x.T @ x)), 16)
  assert np.isfinite(np.asarray(scale)).all()
  assert output_error(matrix, codes, scale, 16, x) < 0.1
