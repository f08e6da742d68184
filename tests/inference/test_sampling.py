# SPDX-License-Identifier: Apache-2.0
"""Draws against the distribution that the limits leave."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse.config.errors import UserError
from jaxsparse.inference.sampling import Sampling, keep_top_p, sample

KEY = jax.random.key(0)
PROBABILITY = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
LOGITS = np.log(PROBABILITY).astype(np.float32) + 3


def frequencies(**limits):
  logits = jnp.asarray(np.tile(LOGITS, (4000, 1)))
  tokens = sample(logits, KEY, Sampling(**limits))
  assert tokens.dtype == jnp.int32
  return np.bincount(tokens, minlength=5) / len(tokens)


def limited(keep, temperature=1.0):
  weight = PROBABILITY ** (1 / temperature) * np.isin(np.arange(5), keep)
  return weight / weight.sum()


SLOW = pytest.mark.slow


# Standard deviation of a frequency: at most 0.008; four of them.
@pytest.mark.parametrize(
  ('limits', 'expected'),
  [
    (dict(), limited([0, 1, 2, 3, 4])),
    pytest.param(
      dict(temperature=0.5), limited([0, 1, 2, 3, 4], 0.5), marks=SLOW
    ),
    (dict(temperature=2.0, top_k=3), limited([1, 3, 4], 2.0)),
    pytest.param(dict(top_k=9), limited([0, 1, 2, 3, 4]), marks=SLOW),
    pytest.param(dict(top_p=0.6), limited([1, 3]), marks=SLOW),
    (dict(top_p=0.7), limited([1, 3, 4])),
    pytest.param(dict(top_p=1e-6), limited([1]), marks=SLOW),
    # Of the three that top_k keeps, two make up 0.65 / 0.85 > 0.7.
    (dict(top_k=3, top_p=0.7), limited([1, 3])),
  ],
  ids=str,
)
def test_frequencies_are_the_probabilities(limits, expected):
  got = frequencies(**limits)
  np.testing.assert_allclose(got, expected, atol=0.032)
  np.testing.assert_array_equal(got[expected == 0], 0)


def random_logits(scale=1.0):
  logits = scale * np.random.default_rng(0).normal(size=(7, 11))
  return jnp.asarray(logits.astype(np.float32))


def test_greedy_takes_the_likeliest():
  logits = random_logits()
  got = sample(logits, KEY, Sampling(temperature=0.0, top_k=3, top_p=0.1))
  np.testing.assert_array_equal(got, np.argmax(logits, axis=-1))


def test_a_row_draws_the_same_in_any_batch():
  logits = np.zeros((6, 50), np.float32)
  whole = np.asarray(sample(jnp.asarray(logits), KEY, Sampling()))
  two = sample(jnp.asarray(logits[:2]), KEY, Sampling())
  np.testing.assert_array_equal(two, whole[:2])
  assert len(set(whole.tolist())) > 1
  other = sample(jnp.asarray(logits), jax.random.key(1), Sampling())
  assert whole.tolist() != other.tolist()


def test_top_p_always_keeps_the_first():
  keep = jax.jit(keep_top_p, static_argnums=1)
  kept = keep(np.array([[100, 0, 0]], np.float32), 1e-9)
  np.testing.assert_array_equal(np.isfinite(kept), [[True, False, False]])


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('temperature', -0.1),
    ('temperature', float('nan')),
    ('temperature', float('inf')),
    ('temperature', 1e-38),
    ('temperature', 2e300),
    ('top_k', -1),
    ('top_p', 0.0),
    ('top_p', 1.1),
    ('top_p', float('nan')),
  ],
)
def test_limits_are_checked(field, value):
  with pytest.raises(
    UserError, match=f'^{field} must .* got {re.escape(str(value))}'
  ):
    Sampling(**{field: value})


@pytest.mark.parametrize(
  ('field', 'value'),
  [('temperature', '1'), ('top_k', 2.5), ('top_k', '3'), ('top_p', None)],
)
def test_limits_are_numbers(field, value):
  limits = object.__new__(Sampling)
  for name, default in dict(temperature=1.0, top_k=0, top_p=1.0).items():
    object.__setattr__(limits, name, default)
  object.__setattr__(limits, field, value)
  # As without the checks of types, which only the tests have.
  with pytest.raises(UserError, match=f'^{field} must'):
    limits.__post_init__()


@pytest.mark.parametrize('scale', [1e-6, 1.0, 1e6])
@pytest.mark.parametrize(
  'limits',
  few(
    [dict(temperature=1e-30, top_p=0.9), dict(top_p=1e-46)],
    [
      dict(temperature=1e-30),
      dict(temperature=1e-30, top_p=0.9),
      dict(temperature=1e-30, top_k=3, top_p=1e-46),
      dict(top_p=1e-46),
      dict(top_k=1),
    ],
  ),
  ids=str,
)
def test_narrow_limits_take_the_likeliest(limits, scale):
  logits = random_logits(scale)
  got = sample(logits, KEY, Sampling(**limits))
  np.testing.assert_array_equal(got, np.argmax(logits, axis=-1))


@pytest.mark.parametrize(
  'limits',
  [dict(temperature=1e30), dict(top_k=10**30), dict(top_p=1 - 1e-16)],
  ids=str,
)
def test_wide_limits_leave_all_tokens(limits):
  logits = jnp.asarray(np.tile(LOGITS, (400, 1)))
  drawn = sample(logits, KEY, Sampling(**limits))
  assert set(drawn.tolist()) == set(range(5))
