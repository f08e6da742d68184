# SPDX-License-Identifier: Apache-2.0
"""Optimizers of touched rows against dense ones and plain loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from lanes import few

from jaxsparse.config.errors import UserError
from jaxsparse.ops.memory.row_gradient import (
  RowGradient,
  row_gradient,
  sort_references,
)
from jaxsparse.training.optimizers.lazy_adam_catchup import HORIZON
from jaxsparse.training.optimizers.row_optimizers import (
  materialize,
  row_adagrad,
  row_adam,
)
from jaxsparse.training.optimizers.row_updates import (
  apply_updates,
  with_float32_master,
)

M, W = 12, 4
WARMUP = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, 120, 1e-3)


def _table(seed=0, dtype=jnp.float32):
  return np.random.default_rng(seed).normal(size=(M, W)).astype(dtype)


def _gradients(num_steps, is_touched, scale=1.0):
  """Of all steps, dense [S, M, W] and by rows, as `is_touched(step, row)`."""
  generator = np.random.default_rng(0)
  dense = scale * generator.normal(size=(num_steps, M, W)).astype(np.float32)
  slot = np.zeros((num_steps, M), np.int32)
  value = np.zeros_like(dense)
  for step in range(num_steps):
    rows = [row for row in range(M) if is_touched(step, row)]
    others = np.setdiff1d(np.arange(M), rows)
    dense[step, others] = 0
    value[step, : len(rows)] = dense[step, rows]
    slot[step] = np.concatenate([rows, M + others])
  return dense, RowGradient(jnp.asarray(slot), jnp.asarray(value))


def _cut(gradients, index):
  """Of some steps or windows; cut by NumPy, which compiles nothing."""
  slot, value = (
    jnp.asarray(np.asarray(x)[index]) for x in (gradients.slot, gradients.value)
  )
  return RowGradient(slot, value)


def _every_7th(step, row):
  """Each row every 7th step, in turn; the last one never."""
  return (step + row) % 7 == 0 and row < M - 1


def _train(*args):
  """Parameters and state in NumPy, whose operations nothing compiles."""
  return jax.device_get(_compiled_train(*args))


@functools.partial(jax.jit, static_argnums=0)
def _compiled_train(optimizer, params, gradients, state=None):
  def step(carry, gradient):
    params, state = carry
    updates, state = optimizer.update(gradient, state, params)
    return (apply_updates(params, updates), state), None

  carry = params, state or optimizer.init(params)
  return jax.lax.scan(step, carry, gradients)[0]


def _materialize(*args, **settings):
  return jax.device_get(_compiled_materialize(*args, **settings))


_compiled_materialize = jax.jit(
  materialize, static_argnums=2, static_argnames=('b1', 'b2', 'weight_decay')
)


def _train_both(dense, by_rows, *args):
  dense_gradients, gradients = _gradients(*args)
  expected, _ = _train(dense, _table(), dense_gradients)
  return expected, *_train(by_rows, _table(), gradients)


ADAMW = optax.adamw(WARMUP, 0.9, 0.99, weight_decay=0.1)


@pytest.mark.parametrize('catch_up', [True, False])
def test_equals_dense_adamw_when_all_rows_are_touched(catch_up):
  expected, actual, _ = _train_both(
    ADAMW,
    row_adam(WARMUP, 0.9, 0.99, weight_decay=0.1, catch_up=catch_up),
    20,
    lambda step, row: True,
  )
  np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  'optimizer',
  [row_adam(1e-2), row_adam(1e-2, catch_up=False), row_adagrad(1e-2)],
  ids=['catch_up', 'lazy', 'adagrad'],
)
def test_untouched_rows_stay_bit_for_bit(optimizer):
  before = _table()
  for params in (before, before.astype(jnp.bfloat16)):
    _, gradients = _gradients(5, lambda step, row: row % 3 == 0)
    after, _ = _train(optimizer, params, gradients)
    is_same = np.all(np.asarray(after == params), axis=1)
    np.testing.assert_array_equal(is_same, np.arange(M) % 3 != 0)


@pytest.mark.parametrize('weight_decay', few([0.1], [0.0, 0.1]))
@pytest.mark.parametrize('rate', [1e-2, WARMUP], ids=['constant', 'schedule'])
def test_catch_up_ends_where_dense_adamw_does(weight_decay, rate):
  """To 5e-6 of parameters near 1 that moved by 0.3.

  What remains is rounding: a dense row rounds its parameters at each of 120
  steps (up to 6e-8 each) and a caught-up row at 17. Epsilon, 1e-8 beside
  gradients near 1, contributes less.
  """
  hyper = dict(b1=0.9, b2=0.999, weight_decay=weight_decay)
  expected, actual, state = _train_both(
    optax.adamw(rate, **hyper), row_adam(rate, **hyper), 120, _every_7th
  )
  # Rows are still on their way to where their return will find them.
  assert np.abs(actual - expected).max() > 1e-3
  actual, _ = _materialize(actual, state, rate, **hyper)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-6)


def test_training_goes_on_from_what_was_caught_up():
  optimizer = row_adam(WARMUP, weight_decay=0.1)
  _, gradients = _gradients(40, _every_7th)
  first, second = _cut(gradients, slice(20)), _cut(gradients, slice(20, None))
  state = jax.jit(optimizer.init)(_table())
  params, state = _train(optimizer, _table(), first, state)
  ends = []
  for start in (
    (params, state),
    _materialize(params, state, WARMUP, weight_decay=0.1),
  ):
    end = _train(optimizer, start[0], second, start[1])
    ends.append(_materialize(*end, WARMUP, weight_decay=0.1)[0])
  np.testing.assert_allclose(*ends, rtol=0, atol=2e-6)


def test_lazy_adam_equals_a_plain_loop():
  """Rows that get a gradient every 7th step and every 3rd, and decay then.

  Their biases are corrected for their own number of steps.
  """

  def is_touched(step, row):
    return step % (3 if row % 2 else 7) == row % 3

  dense, gradients = _gradients(30, is_touched)
  optimizer = row_adam(
    1e-2, 0.9, 0.99, epsilon=1e-6, weight_decay=0.1, catch_up=False
  )
  actual, state = _train(optimizer, _table(), gradients)
  expected = np.array(_table(), np.float64)
  mu, nu, count = np.zeros((M, W)), np.zeros((M, W)), np.zeros(M)
  for gradient in np.asarray(dense, np.float64):
    for row in np.flatnonzero(np.any(gradient, axis=1)):
      g = gradient[row]
      count[row] += 1
      mu[row] = 0.9 * mu[row] + 0.1 * g
      nu[row] = 0.99 * nu[row] + 0.01 * g**2
      root = np.sqrt(nu[row] / (1 - 0.99 ** count[row])) + 1e-6
      direction = mu[row] / (1 - 0.9 ** count[row]) / root
      expected[row] -= 1e-2 * (direction + 0.1 * expected[row])
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6)
  np.testing.assert_array_equal(state.touched, count)


def test_catch_up_beyond_the_horizon():
  """Tails that ended long ago by their closed form, to 1e-3 of them."""
  hyper = dict(b1=0.9, b2=0.99, weight_decay=0.1)
  rate = optax.linear_schedule(1e-2, 2e-3, 1300)

  def is_touched(step, row):
    return step in (100 + row, 120 + row + HORIZON) and row < M - 1

  expected, actual, state = _train_both(
    optax.adamw(rate, **hyper), row_adam(rate, **hyper), 1300, is_touched
  )
  moved = np.abs(expected - _table())[: M - 1].mean()
  assert moved > 0.05
  for params in (actual, _materialize(actual, state, rate, **hyper)[0]):
    is_up_to_date = params is not actual
    error = np.abs(params - expected).max()
    assert (error < 1e-4) == is_up_to_date


def test_epsilon_near_the_gradients_is_caught_up_closely():
  """Epsilon at a tenth of the root of v: half a percent of the way."""
  expected, actual, state = _train_both(
    optax.adamw(1e-2, weight_decay=0.0), row_adam(1e-2), 120, _every_7th, 1e-7
  )
  actual, _ = _materialize(actual, state, 1e-2)
  moved = np.abs(expected - _table()).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=5e-3 * moved)


def test_row_adagrad_equals_a_plain_loop():
  dense, gradients = _gradients(6, lambda step, row: (step + row) % 2 == 0)
  actual, state = _train(row_adagrad(0.1, 1e-6), _table(), gradients)
  expected, sums = np.array(_table(), np.float64), np.zeros(M)
  for step in np.asarray(dense, np.float64):
    for row, gradient in enumerate(step):
      sums[row] += np.mean(gradient**2)
      expected[row] -= 0.1 * gradient / (np.sqrt(sums[row]) + 1e-6)
  np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
  np.testing.assert_allclose(state.sum_of_squares, sums, rtol=1e-6)


@pytest.mark.parametrize('name', ['adagrad', 'adam', 'master'])
def test_split_table_equals_whole(name):
  """Rows over 2 devices and columns over 4, inside a checked shard_map."""
  dtype = jnp.bfloat16 if name == 'master' else jnp.float32

  def make(column_axes):
    if name == 'adagrad':
      return row_adagrad(0.1, column_axes=column_axes)
    adam = row_adam(WARMUP, weight_decay=0.1)
    return with_float32_master(adam) if name == 'master' else adam

  whole, split = make(()), make(('columns',))
  _, gradients = _gradients(3, lambda step, row: row % 3 != step)
  expected, _ = _train(whole, _table(dtype=dtype), gradients)

  def spec(x):
    return {2: jax.P('rows', 'columns'), 1: jax.P('rows'), 0: jax.P()}[x.ndim]

  mesh = jax.make_mesh((2, 4), ('rows', 'columns'))
  with jax.set_mesh(mesh):
    params = jax.device_put(_table(dtype=dtype), spec(_table()))
    state = jax.jit(split.init)(params)
    specs = jax.tree.map(spec, state)
    state = jax.tree.map(jax.device_put, state, specs)

    def step(params, state, slot, value):
      first_row = M // 2 * jax.lax.axis_index('rows')
      slot = slot - first_row
      is_own = (slot >= 0) & (slot < M // 2)
      # Distinct and ascending again, own rows first.
      order = jnp.argsort(~is_own, stable=True)
      slot = jnp.where(is_own, slot, M)[order] + jnp.where(
        is_own[order], 0, jnp.arange(M)
      )
      value = jnp.where(is_own[:, None], value, 0)[order]
      gradient = RowGradient(slot, value)
      updates, state = split.update(gradient, state, params)
      return apply_updates(params, updates), state

    sharded = jax.jit(
      jax.shard_map(
        step,
        in_specs=(spec(params), specs, jax.P(), jax.P(None, 'columns')),
        out_specs=(spec(params), specs),
      )
    )
    slots, values = map(np.asarray, (gradients.slot, gradients.value))
    for slot, value in zip(slots, values, strict=True):
      value = jax.device_put(value, jax.P(None, 'columns'))
      params, state = sharded(params, state, slot, value)
  np.testing.assert_allclose(params, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  'optimizer',
  [row_adam(WARMUP, weight_decay=0.1), row_adagrad(WARMUP)],
  ids=['adam', 'adagrad'],
)
def test_rows_of_a_step_in_several_calls(optimizer):
  _, gradients = _gradients(15, _every_7th)
  expected, expected_state = _train(optimizer, _table(), gradients)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def in_windows(params, state, gradient):
    step = state.count
    for rows in (slice(7), slice(7, M)):
      window = RowGradient(gradient.slot[rows], gradient.value[rows])
      updates, state = optimizer.update(window, state, params, step=step)
      params = apply_updates(params, updates)
    return params, state

  params, state = _table(), jax.jit(optimizer.init)(_table())
  for i in range(15):
    params, state = in_windows(params, state, _cut(gradients, i))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6),
    (params, state),
    (expected, expected_state),
  )


def test_beside_dense_leaves_in_partition_and_chain():
  ones = np.ones((3, 2), np.float32)
  params = {'dense': ones, 'table': _table()}
  labels = {'dense': 'dense', 'table': 'rows'}
  optimizer = optax.chain(
    optax.identity(),
    optax.partition(
      {'dense': optax.adamw(1e-2), 'rows': row_adam(1e-2)}, labels
    ),
  )
  dense, gradients = _gradients(2, lambda step, row: row % 2 == step)
  actual, state = _train(
    optimizer, params, {'dense': np.stack([ones, ones]), 'table': gradients}
  )
  reference = optax.adamw(1e-2, weight_decay=0.0)
  expected, _ = _train(reference, _table(), dense)
  assert np.all(np.asarray(actual['dense']) < 0.99)
  inner = state[1].inner_states['rows'].inner_state
  brought, _ = _materialize(actual, inner, 1e-2)
  np.testing.assert_allclose(brought['table'], expected, rtol=0, atol=1e-6)
  np.testing.assert_array_equal(brought['dense'], actual['dense'])


@pytest.mark.parametrize(
  'optimizer',
  [
    row_adam(1e-3, weight_decay=0.1),
    row_adam(1e-3, catch_up=False),
    row_adagrad(1e-3),
  ],
  ids=['catch_up', 'lazy', 'adagrad'],
)
def test_donated_tables_and_states_change_in_place(optimizer):
  """No temporary of the table's size, and every held byte is reused."""
  num_rows, width, T, k, budget = 20_000, 64, 32, 8, 64

  def step(params, state, slot, weight, cotangent):
    references = sort_references(slot, num_rows)
    count = state.count

    def window(i, carry):
      params, state = carry
      gradient = row_gradient(
        references, weight, cotangent, None, budget, i * budget
      )
      updates, state = optimizer.update(gradient, state, params, step=count)
      return apply_updates(params, updates), state

    num_windows = -(-references.num_distinct // budget)
    return jax.lax.fori_loop(0, num_windows, window, (params, state))

  params = jax.ShapeDtypeStruct((num_rows, width), jnp.float32)
  state = jax.eval_shape(optimizer.init, params)
  compiled = (
    jax.jit(step, donate_argnums=(0, 1))
    .lower(
      params,
      state,
      jax.ShapeDtypeStruct((T, k), jnp.int32),
      jax.ShapeDtypeStruct((T, k, 1), jnp.float32),
      jax.ShapeDtypeStruct((T, 1, width), jnp.float32),
    )
    .compile()
  )
  memory = compiled.memory_analysis()
  held = sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state))
  )
  assert memory.alias_size_in_bytes == held
  assert memory.temp_size_in_bytes < params.size * 4 / 4
  # Not even the state's scalars per row are copied.
  assert f'[{num_rows}]{{0}} copy(' not in compiled.as_text()


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: row_adam(1e-3, b1=1.0), 'b1 must be within 0 and below 1'),
    (lambda: row_adam(1e-3, b2=1.0), 'b2 must be between 0 and 1'),
    (lambda: row_adam(1e-3, epsilon=0.0), 'epsilon must be positive'),
    (lambda: row_adam(1e-3, weight_decay=-1.0), 'weight_decay must not be'),
    (lambda: row_adam(1e-3, b2=0.8), 'b1 must be below the root of b2 = 0.8'),
    (lambda: row_adagrad(1e-3, epsilon=0.0), 'epsilon must be positive'),
  ],
)
def test_refuses_what_cannot_work(make, message):
  with pytest.raises(UserError, match=message):
    make()


def test_refuses_dense_gradients():
  optimizer = row_adagrad(1e-3)
  state = jax.eval_shape(optimizer.init, _table())
  with pytest.raises(UserError, match='must hold RowGradients only'):
    optimizer.update(jnp.asarray(_table()), state, jnp.asarray(_table()))
