# SPDX-License-Identifier: Apache-2.0
"""Runs at any learning rate have one program, and take the steps of their own.

The reference is `train_step` with the rate among its constants.
"""

import dataclasses

import jax
import numpy as np
from small_model import (
  CONFIG,
  compiled_step,
  first_state,
  make_batch,
  make_mesh,
)

from jaxsparse.config import OptimizerConfig
from jaxsparse.training import any_rate, evaluation
from jaxsparse.training.any_rate import AnyRateStep

# The model of a test in a moment: what is compared is the optimizer.
DENSE = dataclasses.replace(
  CONFIG,
  model=dataclasses.replace(CONFIG.model, memory=None, num_layers=1),
  optimizer=OptimizerConfig(warmup_steps=1),
)


def at(rate, **fields):
  optimizer = dataclasses.replace(DENSE.optimizer, learning_rate=rate, **fields)
  return dataclasses.replace(DENSE, optimizer=optimizer)


def after_steps(step, config):
  with jax.set_mesh(make_mesh((1, 1, 1))):
    state = first_state(config)
    for seed in range(3):
      batch = evaluation.to_global(make_batch(seed))
      state, metrics = step(state, batch, {})
  return state.params, metrics


def test_two_rates_share_a_program_and_step_as_they_would_alone():
  any_rate._program.cache_clear()
  found = {}
  for rate in (1e-3, 1e-2):
    found[rate] = after_steps(AnyRateStep(at(rate)), at(rate))
    params, metrics = found[rate]
    np.testing.assert_allclose(metrics['learning_rate'], rate * 0.97, rtol=0.01)
  assert any_rate._program.cache_info().misses == 1
  program = any_rate._program(any_rate._without_rate(at(1e-2)))
  assert program._cache_size() == 1
  expected, _ = after_steps(compiled_step(at(1e-2)), at(1e-2))
  params, _ = found[1e-2]
  assert jax.tree.all(
    jax.tree.map(lambda x, y: np.allclose(x, y, atol=1e-5), params, expected)
  )
  other, _ = found[1e-3]
  first, second = (jax.tree.leaves(tree)[0] for tree in (params, other))
  assert not np.allclose(first, second, atol=1e-3)


def test_runs_that_differ_in_more_have_programs_of_their_own():
  same = any_rate._without_rate(at(1e-3))
  assert same == any_rate._without_rate(at(1e-2))
  assert same != any_rate._without_rate(at(1e-3, b2=0.9))
