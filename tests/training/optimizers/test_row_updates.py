# SPDX-License-Identifier: Apache-2.0
"""Rounding, masters and application of row updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsparse.ops.memory.row_gradient import RowGradient
from jaxsparse.training.optimizers.row_optimizers import row_adagrad
from jaxsparse.training.optimizers.row_updates import (
  apply_updates,
  in_float32,
  squared_norm,
  with_float32_master,
)

apply = jax.jit(apply_updates)


def _rows(slot, value):
  return RowGradient(jnp.asarray(slot, jnp.int32), jnp.asarray(value))


def test_rows_and_whole_arrays_side_by_side():
  params = {'dense': np.ones(3), 'none': None, 'table': np.ones((4, 2))}
  value = np.array([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]])
  updates = {
    'dense': np.arange(3.0),
    'none': None,
    'table': _rows([0, 3, 4], value),
  }
  new = apply(params, updates)
  np.testing.assert_array_equal(new['dense'], [1, 2, 3])
  np.testing.assert_array_equal(new['table'], [[2, 3], [1, 1], [1, 1], [4, 5]])
  np.testing.assert_allclose(
    jax.jit(squared_norm)(updates['table']), np.square(value).sum()
  )


@pytest.mark.parametrize('is_row', [True, False])
def test_stochastic_rounding_has_the_right_mean(is_row):
  """Steps of 1/32 of bf16's resolution, which rounding to nearest would lose.

  Of n = 8192 roundings up with p = 1/32 the share is p to 5 deviations of
  sqrt(p (1 - p) / n), about 0.01.
  """
  params = np.array([[1.0, -1.0, 2.0**-100]], jnp.bfloat16)
  params = np.repeat(np.tile(params, (32, 1)), 256, axis=1)
  unit = np.array([[2.0**-7, -(2.0**-7), 2.0**-107]], np.float32)
  unit = np.tile(np.repeat(unit, 256, axis=1), (32, 1))
  update = unit / 32
  if is_row:
    update = _rows(np.arange(32), update)
  key = jax.random.key(0)
  new = np.asarray(apply(params, update, key))
  assert new.dtype == jnp.bfloat16
  ups = (new.astype(np.float32) - params.astype(np.float32)) / unit
  assert set(np.unique(ups)) == {0.0, 1.0}
  share = ups.reshape(32, 3, 256).mean(axis=(0, 2))
  np.testing.assert_allclose(share, 1 / 32, rtol=0, atol=0.01)
  # By rows and by columns alike: no stripes.
  assert ups.mean(axis=0).max() < 0.3
  assert ups.mean(axis=1).max() < 0.1
  np.testing.assert_array_equal(new, apply(params, update, key))
  other = apply(params, update, jax.random.key(1))
  assert np.any(new != np.asarray(other))
  np.testing.assert_array_equal(params, apply(params, update))


def test_stochastic_rounding_keeps_what_bf16_holds():
  values = [0.0, 2.0**-120, 1.5, -3.0e38, np.inf, -np.inf]
  params = np.zeros((64, 8), jnp.bfloat16)
  x = np.tile(np.array([values], np.float32), (64, 1))
  x = x.astype(jnp.bfloat16).astype(np.float32)
  # All bits of a NaN's mantissa, and only the last one.
  nans = np.array([[0x7FFFFFFF, 0x7F800001]], np.uint32).view(np.float32)
  x = np.concatenate([x, np.tile(nans, (64, 1))], axis=1)
  new = np.asarray(apply(params, x, jax.random.key(0)))
  np.testing.assert_array_equal(new.astype(np.float32), x)


def test_a_key_leaves_f32_parameters_alone():
  params = np.ones((2, 3), np.float32)
  update = np.full((2, 3), 1e-6, np.float32)
  np.testing.assert_array_equal(
    apply(params, update, jax.random.key(0)), params + update
  )


@pytest.mark.parametrize('is_row', [True, False])
def test_parameters_are_the_rounded_master(is_row):
  inner = row_adagrad(1e-3) if is_row else optax.adam(1e-3)
  optimizer = with_float32_master(inner)
  draws = np.random.default_rng(0).normal(size=(51, 6, 4)).astype(np.float32)
  params = draws[0].astype(jnp.bfloat16)

  def step(carry, gradient):
    params, state, dense_params, dense_state = carry
    dense, dense_state = inner.update(
      _rows(np.arange(6), gradient) if is_row else gradient,
      dense_state,
      dense_params,
    )
    dense_params = apply_updates(dense_params, dense)
    update = _rows(np.arange(6), gradient) if is_row else gradient
    updates, state = optimizer.update(update, state, params)
    params = apply_updates(params, updates)
    is_equal = jnp.all(params == state.master.astype(jnp.bfloat16))
    return (params, state, dense_params, dense_state), is_equal

  @jax.jit
  def run(params, gradients):
    wide = params.astype(jnp.float32)
    carry = params, optimizer.init(params), wide, inner.init(wide)
    return jax.lax.scan(step, carry, gradients)

  (_, state, expected, _), is_equal = run(params, draws[1:])
  assert np.all(is_equal)
  np.testing.assert_array_equal(state.master, expected)


def test_in_float32_keeps_states_wide():
  params = np.ones((3, 2), jnp.bfloat16)
  optimizer = in_float32(optax.adamw(1e-2))
  gradient = np.full((3, 2), 0.3, jnp.bfloat16)

  @jax.jit
  def step(params, gradient):
    return optimizer.update(gradient, optimizer.init(params), params)

  updates, state = step(params, gradient)
  assert state[0].mu.dtype == state[0].nu.dtype == jnp.float32
  assert updates.dtype == jnp.float32
  np.testing.assert_allclose(state[0].mu, 0.1 * gradient.astype(np.float32))
  assert apply(params, updates).dtype == jnp.bfloat16
  plain = jax.eval_shape(optax.adamw(1e-2).init, params)
  assert plain[0].mu.dtype == jnp.bfloat16
