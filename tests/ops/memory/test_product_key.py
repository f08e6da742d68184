# SPDX-License-Identifier: Apache-2.0
"""Product keys against brute force, and the published counts of candidates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.ops.memory import product_key
from jaxsparse.ops.memory.product_key import candidates

# Compiled as a whole: op by op takes seconds.
product_key_top_m, product_key_top_m_reference = (
  jax.jit(function, static_argnums=2)
  for function in (
    product_key.product_key_top_m,
    product_key.product_key_top_m_reference,
  )
)


@pytest.mark.parametrize(
  ('num_selected', 'count'),
  [(16, 50), (32, 119), (42, 168), (64, 280), (80, 368), (128, 645)],
)
def test_counts_of_candidates(num_selected, count):
  assert len(candidates(num_selected)[0]) == count


@pytest.mark.parametrize(
  ('num_keys', 'num_selected'), [(40, 32), (7, 7), (9, 1), (64, 5)]
)
def test_equals_brute_force(num_keys, num_selected):
  rng = np.random.default_rng(num_keys)
  row, column = rng.normal(size=(2, 30, 2, num_keys)).astype(np.float32)
  scores, address = product_key_top_m(row, column, num_selected)
  expected, places = product_key_top_m_reference(row, column, num_selected)
  np.testing.assert_allclose(scores, expected, rtol=1e-6)
  # Without ties there is one right answer, in one order.
  np.testing.assert_array_equal(address, places)


def test_gradient_reaches_the_kept_scores_only():
  rng = np.random.default_rng(0)
  row, column = rng.normal(size=(2, 3, 2, 8)).astype(np.float32)
  weight = rng.normal(size=(3, 2, 4)).astype(np.float32)

  def loss(op):
    return lambda *args: jnp.sum(weight * op(*args, 4)[0])

  fast, slow = (
    jax.jit(jax.grad(loss(op), (0, 1)))(row, column)
    for op in (product_key_top_m, product_key_top_m_reference)
  )
  for a, b in zip(fast, slow, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-6)
    assert 0 < np.count_nonzero(a) <= 3 * 2 * 4
