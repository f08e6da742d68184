# SPDX-License-Identifier: Apache-2.0
"""Training in float16: the loss is scaled, and steps that overflow left out."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import (
  CONFIG,
  first_state,
  make_batch,
  make_mesh,
  run,
  with_tables,
)

from jaxsparse.config import MemoryConfig
from jaxsparse.training import evaluation, loss_scale
from jaxsparse.training.step import train_step


def config_of(dtype):
  """One block with a memory layer, whose table learns by rows."""
  memory = MemoryConfig.pkm(
    num_keys=16, key_dim=8, num_heads=1, num_selected=6, value_dim=32,
    placements=((0, 0),),
  )  # fmt: skip
  return dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(
      CONFIG.model, num_layers=1, memory=memory, dtype=dtype
    ),
    optimizer=dataclasses.replace(
      CONFIG.optimizer, value_optimizer='row_adam', value_weight_decay=0.1
    ),
  )


@functools.cache
def compiled(dtype):
  """The train step; it is given its state to keep."""
  return jax.jit(functools.partial(train_step, config_of(dtype)))


def start(scale=None):
  """The state before the first step, in float16 if there is a scale."""
  state = first_state(config_of('float32'))
  if scale is None:
    return state
  first = jax.jit(functools.partial(loss_scale.first, 'float16'))()
  one = first._replace(scale=first.scale * (scale / loss_scale.FIRST))
  return dataclasses.replace(state, loss_scale=one)


def steps(state, seeds, dtype='float16'):
  losses = []
  for seed in seeds:
    batch = evaluation.to_global(make_batch(seed))
    state, metrics = compiled(dtype)(state, batch)
    losses.append(metrics['loss'])
  return state, metrics, losses


@pytest.fixture(autouse=True)
def own_mesh():
  with jax.set_mesh(make_mesh((1, 1, 1))):
    yield


@pytest.mark.slow
def test_losses_follow_those_of_float32():
  """Two batches in turn, whose loss falls by most of a nat."""
  seeds = [0, 1] * 5
  _, wide, expected = steps(start(), seeds, 'float32')
  state, metrics, losses = steps(start(loss_scale.FIRST), seeds)
  assert expected[-1] < expected[0] - 0.8
  np.testing.assert_allclose(losses, expected, rtol=0.01)
  np.testing.assert_allclose(losses[0], expected[0], rtol=1e-3)
  norms = metrics['grad_norm'], wide['grad_norm']
  np.testing.assert_allclose(*norms, rtol=0.05)
  assert metrics['overflows'] == 0
  types = {x.dtype for x in jax.tree.leaves(state.params)}
  assert types == {jnp.dtype('float32')}


def test_steps_that_overflow_leave_no_trace():
  """After some that are left out the next is as if it were the first."""
  before = start(scale=2.0**30)
  state, metrics, _ = steps(before, [0, 0, 0])
  assert not np.isfinite(metrics['grad_norm'])
  jax.tree.map(
    np.testing.assert_array_equal,
    (state.params, state.opt_state),
    (before.params, before.opt_state),
  )
  assert (state.step, metrics['overflows']) == (3, 3)
  # No more than the most, and then halved.
  assert metrics['loss_scale'] == loss_scale.MOST / 2
  assert state.loss_scale.scale == loss_scale.MOST / 4
  fitting = state.loss_scale._replace(scale=jnp.float32(loss_scale.FIRST))
  state, metrics, _ = steps(dataclasses.replace(state, loss_scale=fitting), [1])
  first, expected, _ = steps(start(loss_scale.FIRST), [1])
  jax.tree.map(
    np.testing.assert_array_equal,
    (state.params, state.opt_state),
    (first.params, first.opt_state),
  )
  assert metrics['learning_rate'] == expected['learning_rate']
  assert (state.step, state.loss_scale.num_overflows) == (4, 3)


def test_the_scale_follows_what_fits():
  state, *_ = steps(start(loss_scale.MOST), range(12))
  left_out = int(state.loss_scale.num_overflows)
  assert 0 < left_out < 12
  assert state.loss_scale.scale == loss_scale.MOST / 2**left_out
  assert state.loss_scale.num_good == 12 - left_out


@pytest.mark.slow
def test_it_is_the_same_on_every_mesh_in_parts_and_passes():
  def config(scheme, **settings):
    config = with_tables(scheme, 'row_adam', **settings)
    memory = dataclasses.replace(config.model.memory, placements=((0, 0),))
    model = dataclasses.replace(
      config.model, num_layers=1, memory=memory, dtype='float16'
    )
    return dataclasses.replace(config, model=model)

  many = config('rows', value_row_budget=20, grad_accumulation=2)
  losses, state = run(many, (2, 2, 2))
  np.testing.assert_allclose(
    losses, run(config('auto'), (1, 1, 1))[0], rtol=5e-3
  )
  with jax.set_mesh(make_mesh((2, 2, 2))):
    scale = state.loss_scale._replace(scale=state.loss_scale.scale * 2**20)
    before = dataclasses.replace(state, loss_scale=scale)
    step = jax.jit(functools.partial(train_step, many))
    after, metrics = step(before, evaluation.to_global(make_batch(0)))
  assert int(metrics['overflows']) == 1
  jax.tree.map(
    np.testing.assert_array_equal,
    (after.params, after.opt_state),
    (state.params, state.opt_state),
  )


@pytest.mark.parametrize(
  ('before', 'is_finite', 'expected'),
  [
    ((8.0, 5, 2), True, (8.0, 6, 2)),
    ((8.0, loss_scale.PATIENCE - 1, 2), True, (16.0, 0, 2)),
    ((loss_scale.MOST, loss_scale.PATIENCE - 1, 2), True, None),
    ((8.0, 5, 2), False, (4.0, 0, 3)),
    ((loss_scale.LEAST, 5, 2), False, (loss_scale.LEAST, 0, 3)),
  ],
)
def test_the_rule(before, is_finite, expected):
  expected = expected or (loss_scale.MOST, 0, 2)
  state = loss_scale.LossScale(*map(jnp.asarray, before))
  assert loss_scale.after(state, jnp.asarray(is_finite)) == expected
