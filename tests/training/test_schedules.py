# SPDX-License-Identifier: Apache-2.0
"""Schedules: where the rate stands, and that an endless one can be gone on."""

import jax
import numpy as np
import pytest

from jaxsparse.config import Config, OptimizerConfig, TrainConfig
from jaxsparse.config.errors import UserError
from jaxsparse.training import changes, schedules


def rates(num_steps, steps=None, **fields):
  config = OptimizerConfig(
    schedule='infinite', learning_rate=1.0, warmup_steps=4, **fields
  )
  schedule = jax.jit(schedules.learning_rate(config, num_steps))
  return np.array([schedule(step) for step in range(steps or num_steps)])


FALLING = dict(cooldown_steps=8, constant_lr_fraction=0.5)


def test_the_endless_schedule_rises_falls_and_stays():
  found = rates(30, **FALLING)
  np.testing.assert_allclose(found[:5], [0.1, 0.325, 0.55, 0.775, 1], rtol=1e-6)
  # Half of a cosine's fall after half of the cool-down.
  np.testing.assert_allclose(found[8], 0.75, rtol=1e-6)
  assert (np.diff(found[4:13]) < 0).all()
  np.testing.assert_allclose(found[12:], 0.5, rtol=1e-6)
  without = rates(30)
  np.testing.assert_allclose(without[4:], 1.0)


def test_annealing_falls_exponentially_at_the_end_alone():
  plain, found = rates(30, **FALLING), rates(30, 31, anneal_steps=10, **FALLING)
  np.testing.assert_array_equal(found[:21], plain[:21])
  np.testing.assert_allclose(found[20], 0.5, rtol=1e-6)
  np.testing.assert_allclose(found[30], 0.1, rtol=1e-5)
  np.testing.assert_allclose(found[21:] / found[20:-1], 0.2**0.1, rtol=1e-5)


def test_a_run_goes_on_from_the_constant_as_if_it_had_been_longer():
  """Once at the constant, with or without an end, no step before is another."""
  short = rates(20, **FALLING)
  for fields in (dict(), dict(anneal_steps=10)):
    long = rates(40, **FALLING, **fields)
    np.testing.assert_array_equal(long[:20], short)

  def run(num_steps, **fields):
    optimizer = OptimizerConfig(schedule='infinite', **FALLING, **fields)
    return Config(optimizer=optimizer, train=TrainConfig(num_steps=num_steps))

  old = run(200)
  assert changes.rates(old, run(400, anneal_steps=100), 200) == []
  # But not from within the annealing.
  assert changes.rates(run(200, anneal_steps=100), run(400), 150)


def test_annealing_from_within_the_warm_up_is_refused():
  """It would begin at a tenth of the peak, and never come near it."""

  def run(anneal_steps, warmup_steps):
    optimizer = OptimizerConfig(
      schedule='infinite', anneal_steps=anneal_steps, warmup_steps=warmup_steps
    )
    return Config(optimizer=optimizer, train=TrainConfig(num_steps=100))

  run(100, 0), run(50, 50)
  with pytest.raises(
    UserError, match=r'anneal_steps must be at most 50, .* 51'
  ):
    run(51, 50)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    (dict(schedule='linear'), 'schedule must be one of cosine, infinite'),
    (dict(anneal_steps=3), "anneal_steps = 3 does nothing with schedule = 'c"),
    (dict(cooldown_steps=3), 'cooldown_steps = 3 does nothing'),
    (
      dict(schedule='infinite', constant_lr_fraction=0.5),
      'does nothing with cooldown_steps = 0',
    ),
    (
      dict(schedule='infinite', cooldown_steps=9, constant_lr_fraction=2.0),
      'constant_lr_fraction must be above 0',
    ),
    (
      dict(schedule='infinite', final_lr_fraction=0.5),
      'does nothing with anneal_steps = 0',
    ),
    (
      dict(schedule='infinite', anneal_steps=5, final_lr_fraction=0.0),
      'final_lr_fraction must be above 0',
    ),
    (dict(schedule='infinite', anneal_steps=601), 'at most num_steps = 600'),
  ],
)
def test_what_would_do_nothing_is_refused(fields, words):
  with pytest.raises(UserError, match=words):
    Config(optimizer=OptimizerConfig(**fields))
