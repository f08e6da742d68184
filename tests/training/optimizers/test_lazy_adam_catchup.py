# SPDX-License-Identifier: Apache-2.0
"""What absent rows miss, against dense AdamW step by step in f64."""

import jax
import numpy as np
import optax
import pytest

from jaxsparse.training.optimizers.lazy_adam_catchup import HORIZON, MissedSteps

NUM_STEPS = 2600
GAPS = np.array([0, 1, 7, 40, 300, HORIZON, HORIZON + 1, 1100, 1500, 2550])
# Roots of the second moments in units of epsilon, and moments in units of them.
ROOTS = np.array([1e-3, 1e-1, 1.0, 1e1, 1e3, 1e6, 1e10])
MOMENT = 1.5

COSINE = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, NUM_STEPS, 1e-4)
RATES = (1e-3, COSINE, optax.linear_schedule(2e-3, 0.0, NUM_STEPS))


def dense_adamw(missed, rates, starts):
  """What the missed steps add to parameters, [starts, gaps, roots]."""
  last = NUM_STEPS - GAPS[:, None]
  roots = np.tile(ROOTS * missed.epsilon, (len(GAPS), 1))
  start = np.array(starts)[:, None, None]
  p, m, v = start, MOMENT * roots, roots**2
  for step in range(1, NUM_STEPS + 1):
    is_missed = step > last
    m = m * np.where(is_missed, missed.b1, 1.0)
    v = v * np.where(is_missed, missed.b2, 1.0)
    root = np.sqrt(v / (1 - missed.b2**step)) + missed.epsilon
    update = m / (1 - missed.b1**step) / root + missed.weight_decay * p
    p = p - np.where(is_missed, rates[step - 1], 0.0) * update
  return p - start


def caught_up(missed, rates, start):
  decay = None
  if missed.weight_decay:
    each = np.log1p(-missed.weight_decay * rates)
    decay = np.array([each[NUM_STEPS - gap :].sum() for gap in GAPS])
    decay = decay.astype(np.float32)
  roots = np.tile(np.float32(ROOTS * missed.epsilon), (len(GAPS), 1))
  return catch_up(
    missed,
    np.full_like(roots, start),
    np.float32(MOMENT) * roots,
    np.square(roots),
    NUM_STEPS - GAPS,
    NUM_STEPS,
    decay,
  )


def catch_up(missed, p, m, v, last, step, decay):
  """What the steps since `last` add to the parameters, in one program."""

  @jax.jit
  def run(p, m, v, last, step, decay):
    return missed.catch_up(p, m, v, last, step, missed.recent(step), decay)[0]

  return np.asarray(run(p, m, v, last, step, decay))


@pytest.mark.parametrize(
  'seed',
  [*range(4), *(pytest.param(i, marks=pytest.mark.slow) for i in range(4, 24))],
)
def test_all_absences_end_where_dense_adamw_does(seed):
  """Any b1 and b2 that may be, b1 up to all but the root of b2.

  2 % of the way at most where the second moment's root is far from epsilon,
  10 % anywhere. The rest is the rounding of what decays.
  """
  rng = np.random.default_rng(seed)
  b2 = 1 - 10 ** rng.uniform(-3, -0.3)
  b1 = b2**0.5 * (1 - 10 ** rng.uniform(-5, -0.5))
  missed = MissedSteps(
    RATES[seed % 3],
    b1,
    b2,
    epsilon=10 ** rng.uniform(-15, -8),
    weight_decay=seed % 2 * rng.uniform(0, 0.5),
  )
  rates = jax.jit(missed.rate)(np.arange(1, NUM_STEPS + 1))
  rates = np.asarray(rates, np.float64)
  moved, expected = dense_adamw(missed, rates, [0.0, 0.5])
  moved = np.abs(moved).max(0)
  error = np.abs(caught_up(missed, rates, 0.5) - expected)
  assert np.all(error < 0.1 * moved + 2e-7)
  is_far = ROOTS >= 1e3
  assert np.all(error[:, is_far] < 0.02 * moved[is_far] + 2e-7)


def test_a_long_absence_with_b1_near_the_root_of_b2():
  """Momentum outlasts the horizon; the whole tail would move it by 18."""
  missed = MissedSteps(1e-3, 0.9746, 0.95, epsilon=1e-12, weight_decay=0.0)
  p, m, v = np.array([0, 0.3, 0.04], np.float32)[:, None, None]
  shift = catch_up(missed, p, m, v, np.array([50]), 1150, None)
  np.testing.assert_allclose(shift, -1.471, rtol=1e-3)
