# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.ops import cpu, top_k

# Compiled as a whole: op by op takes seconds.
top_m = jax.jit(top_k.top_m, static_argnums=1, static_argnames='is_stable')
top_m_reference = jax.jit(top_k.top_m_reference, static_argnums=1)


def draw(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('shape', [(1, 5), (7, 40), (2, 3, 2, 129)])
@pytest.mark.parametrize('m', [1, 5])
def test_equals_reference(shape, m):
  scores = draw(*shape)
  values, indices = top_m(scores, m)
  expected_values, expected_indices = top_m_reference(scores, m)
  np.testing.assert_array_equal(values, expected_values)
  np.testing.assert_array_equal(indices, expected_indices)


def test_stable_mode_keeps_ties_in_order():
  scores = np.array([[1, 2, 2, 2, 0, 2]], np.float32)
  _, indices = top_m(scores, 3, is_stable=True)
  np.testing.assert_array_equal(indices, [[1, 2, 3]])


def test_narrow_scores_are_compared_in_f32():
  scores = draw(4, 64).astype(jnp.bfloat16)
  assert jax.eval_shape(lambda s: top_m(s, 3), scores)[0].dtype == jnp.float32
  compiled = top_m.lower(scores, 3).compile()
  assert ' sort(' not in compiled.as_text()


# So many rows of so few candidates are counted on a CPU.
@pytest.mark.parametrize('shape', [(512, 9), (3, 257, 96)])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_many_rows_equal_the_reference_with_ties_in_order(shape, dtype):
  scores = draw(*shape).astype(dtype)
  # Every score stands there twice, and one row is all ties.
  scores = np.concatenate([scores, scores], -1)[..., : shape[-1]]
  scores[0] = 1.0
  values, indices = top_m(scores, 7, is_stable=True)
  expected_values, expected_indices = top_m_reference(scores, 7)
  np.testing.assert_array_equal(values, expected_values)
  np.testing.assert_array_equal(indices, expected_indices)


def test_gradients_of_many_rows_reach_what_was_kept():
  @functools.partial(jax.jit, static_argnums=0)
  def gradient(function, scores):
    return jax.grad(lambda s: (function(s, 3)[0] ** 2).sum())(scores)

  scores = draw(600, 20)
  got, expected = (gradient(f, scores) for f in (top_m, top_m_reference))
  np.testing.assert_array_equal(got, expected)


# So many rows of so many candidates are bisected on a CPU.
@pytest.mark.parametrize('kind', ['any', 'ties', 'low'])
def test_groups_of_many_candidates_equal_the_reference_with_ties_in_order(kind):
  scores = draw(130, 517)
  if kind == 'ties':
    scores = np.round(scores * 2) / 2
    scores[0] = -np.inf
    scores[1, :30], scores[1, 30:] = np.inf, -np.inf
  elif kind == 'low':
    scores -= 9
  assert cpu.bisects_faster(jnp.asarray(scores), 32)
  values, indices = top_m(scores, 32, is_stable=True)
  expected_values, expected_indices = top_m_reference(scores, 32)
  np.testing.assert_array_equal(values, expected_values)
  np.testing.assert_array_equal(indices, expected_indices)


def test_many_rows_with_nans_keep_indices_in_range():
  _, indices = top_m(np.full((512, 20), np.nan, np.float32), 3)
  indices = np.asarray(indices)
  assert indices.min() >= 0
  assert indices.max() < 20


@pytest.mark.parametrize(
  ('shape', 'num_selected', 'expected'),
  [((128, 512), 32, True), ((127, 512), 32, False), ((128, 512), 33, False)],
)
def test_bisection_is_for_few_of_many_in_many_rows(
  shape, num_selected, expected
):
  rows = jnp.zeros(shape)
  assert cpu.bisects_faster(rows, num_selected) == expected
  # Numbers of 32 bits alone have the order of their bits.
  assert not cpu.bisects_faster(rows.astype(jnp.bfloat16), num_selected)


@pytest.mark.parametrize(
  ('num_candidates', 'expected'), [(96, True), (128, False)]
)
def test_counting_ends_where_sorting_is_faster(num_candidates, expected):
  assert cpu.counts_faster(jnp.zeros((512, num_candidates)), 16) == expected


@pytest.mark.parametrize('shape', [(5, 9), (64, 34)])
def test_comparing_all_pairs_keeps_ties_in_order(shape):
  scores = draw(*shape)
  scores[1], scores[2] = 1.0, scores[2].round()

  @jax.jit
  def both(scores):
    return top_k.compare_top_k(scores, 3), jax.lax.top_k(scores, 3)

  for got, expected in zip(*both(scores), strict=True):
    np.testing.assert_array_equal(got, expected)


def test_comparing_nans_keeps_indices_in_range():
  nothing = jnp.full((2, 20), jnp.nan)
  _, indices = jax.jit(top_k.compare_top_k, static_argnums=1)(nothing, 3)
  assert 0 <= np.min(indices) <= np.max(indices) < 20
