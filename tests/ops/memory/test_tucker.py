# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse.ops.memory import tucker

# Compiled as a whole, the references too: op by op takes seconds.
tucker_top_m = jax.jit(
  tucker.tucker_top_m, static_argnums=3, static_argnames='two_quadrants'
)
leading_directions = jax.jit(tucker.leading_directions)
singular_values = jax.jit(tucker.singular_values)
tucker_top_m_exhaustive_reference = jax.jit(
  tucker.tucker_top_m_exhaustive_reference, static_argnums=3
)
tucker_top_m_two_stage_reference = jax.jit(
  tucker.tucker_top_m_two_stage_reference, static_argnums=3
)
loss_and_gradient = jax.jit(
  jax.value_and_grad(tucker.lower_singular_loss), static_argnums=1
)


def _normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _inputs(T=5, H=2, Q=24, r=2, c=2, seed=0):
  row, column = _normal(2, T, H, Q, r, seed=seed)
  cores = np.random.default_rng(seed + 1).uniform(size=(c, H, r, r))
  return row, column, cores.astype(np.float32)


def _assert_same_cells(actual, expected):
  """Equal up to the order of cells of equal score."""
  scores, address = actual
  expected_scores, expected_address = expected
  order = np.argsort(address, axis=-1)
  expected_order = np.argsort(expected_address, axis=-1)
  np.testing.assert_array_equal(
    np.take_along_axis(np.asarray(address), order, -1),
    np.take_along_axis(np.asarray(expected_address), expected_order, -1),
  )
  np.testing.assert_allclose(
    np.take_along_axis(np.asarray(scores), order[..., None], 2),
    np.take_along_axis(
      np.asarray(expected_scores), expected_order[..., None], 2
    ),
    rtol=1e-5,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  ('r', 'c'),
  few([(1, 1), (2, 2), (3, 2)], [(1, 1), (2, 1), (2, 2), (2, 3), (3, 2)]),
)
def test_equals_the_two_stages_as_told(r, c):
  row, column, cores = _inputs(r=r, c=c)
  directions = leading_directions(cores.sum(0))
  _assert_same_cells(
    tucker_top_m(row, column, cores, 6),
    tucker_top_m_two_stage_reference(row, column, cores, 6, directions),
  )


@pytest.mark.parametrize('two_quadrants', [False, True])
def test_is_exhaustive_when_every_key_is_a_candidate(two_quadrants):
  # Two quadrants hold half of the grid's cells, both signs of rank 1 products.
  row, column, cores = _inputs(Q=8)
  if two_quadrants:
    cores = np.ones_like(cores)  # rank 1: all winners have factors of one sign
  m = 8
  actual = tucker_top_m(row, column, cores, m, two_quadrants=two_quadrants)
  expected = tucker_top_m_exhaustive_reference(row, column, cores, m)
  if two_quadrants:
    found = _recall(actual[1], expected[1])
    assert found > 0.9
  else:
    _assert_same_cells(actual, expected)


def _recall(address, expected):
  address, expected = (np.asarray(a).reshape(-1, a.shape[-1]) for a in
                       (address, expected))  # fmt: skip
  hits = [len(set(a) & set(e)) for a, e in zip(address, expected, strict=True)]
  return np.mean(hits) / expected.shape[-1]


@functools.cache
def _gaussian_scores():
  """With the best of all cells."""
  inputs = _inputs(T=1, H=64, Q=512, c=1)
  return inputs, tucker_top_m_exhaustive_reference(*inputs, 32)[1]


@pytest.mark.parametrize(
  ('two_quadrants', 'low', 'high'), [(False, 0.40, 0.53), (True, 0.95, 1.0)]
)
def test_recall_of_gaussian_scores(two_quadrants, low, high):
  inputs, expected = _gaussian_scores()
  _, address = tucker_top_m(*inputs, 32, two_quadrants=two_quadrants)
  assert low <= _recall(address, expected) <= high


def _best(scores, num_selected):
  address = np.argsort(-scores, axis=-1, kind='stable')[..., :num_selected]
  return np.take_along_axis(scores, address, -1), address


def _softmax(scores):
  """Over the cells [T, P, k, 1]."""
  weights = np.exp(scores)
  return weights / weights.sum(2, keepdims=True)


def test_product_keys_are_a_special_case():
  """Row + column is rank 2 with an identity core and constant ranks."""
  s, t = _normal(2, 3, 1, 20)
  one = np.ones_like(s)
  first, second = np.eye(2, dtype=np.float32)[:, None]
  scores, address = tucker_top_m(
    np.stack([s, one], -1),
    np.stack([one, t], -1),
    np.eye(2, dtype=np.float32)[None, None],
    5,
    directions=(first, second),
  )
  total = (s[..., :, None] + t[..., None, :]).reshape(3, 1, -1)
  expected_scores, expected_address = _best(total, 5)
  _assert_same_cells(
    (_softmax(np.asarray(scores)), address),
    (_softmax(expected_scores[..., None]), expected_address),
  )
  # With rank 1 a cell is a product, which is another model.
  scores, address = tucker_top_m(
    s[..., None], t[..., None], np.ones((1, 1, 1, 1), np.float32), 20
  )
  product = (s[..., :, None] * t[..., None, :]).reshape(3, 1, -1)
  expected_scores, expected_address = _best(product, 20)
  _assert_same_cells(
    (scores, address), (expected_scores[..., None], expected_address)
  )
  assert not np.array_equal(address, _best(total, 20)[1])


def test_cores_select_by_their_sum():
  row, column, cores = _inputs(c=1)
  scores, address = tucker_top_m(row, column, cores, 6)
  halves = np.concatenate([cores / 2, cores / 2])
  half_scores, half_address = tucker_top_m(row, column, halves, 6)
  np.testing.assert_array_equal(address, half_address)
  np.testing.assert_allclose(
    half_scores, np.repeat(np.asarray(scores) / 2, 2, axis=-1), rtol=1e-5
  )


@pytest.mark.parametrize('two_quadrants', [False, True])
def test_gradients_equal_autodiff_of_the_kept_cells(two_quadrants):
  inputs = _inputs()
  factor = np.arange(1, 13, dtype=np.float32).reshape(1, 1, 6, 2)

  def loss(row, column, cores):
    scores, address = tucker_top_m(
      row, column, cores, 6, two_quadrants=two_quadrants
    )
    return (scores * factor).sum(), address

  def expected(row, column, cores, address):
    grid = jnp.einsum('thip,chpq,thjq->thijc', row, cores, column)
    t, h = np.ogrid[:5, :2]
    kept = grid[t[..., None], h[..., None], address // 24, address % 24]
    return (kept * factor).sum()

  gradients, address = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs)
  for actual, wanted in zip(
    gradients,
    jax.jit(jax.grad(expected, (0, 1, 2)))(*inputs, address),
    strict=True,
  ):
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-4)


def test_tiles_of_tokens_change_nothing(monkeypatch):
  inputs = _inputs(T=7)
  whole = tucker_top_m(*inputs, 6)
  monkeypatch.setattr(tucker, '_TILE_CELLS', 2 * 36 * 3)
  # Afresh: a trace kept from elsewhere would hide the patched constant.
  tiled = jax.jit(lambda *args: tucker.tucker_top_m(*args, 6))(*inputs)
  jax.tree.map(np.testing.assert_array_equal, whole, tiled)


@pytest.mark.parametrize('seed', range(3))
def test_directions_are_the_leading_singular_pair(seed):
  core = _normal(50, 2, 2, seed=seed)
  u, t = map(np.asarray, leading_directions(core))
  left, values, right = np.linalg.svd(core)
  projection = np.einsum('hi,hj->hij', u, t) * values[:, :1, None]
  expected = left[:, :, :1] * values[:, None, :1] * right[:, :1, :]
  np.testing.assert_allclose(projection, expected, atol=2e-5)
  assert (u.sum(-1) + t.sum(-1) >= 0).all()
  np.testing.assert_allclose(singular_values(core), values, atol=2e-6)


@pytest.mark.parametrize('r', [2, 3])
def test_directions_are_continuous(r):
  core = np.random.default_rng(0).uniform(size=(200, r, r)).astype(np.float32)
  noise = 1e-4 * _normal(200, r, r, seed=1)
  values = np.linalg.svd(core, compute_uv=False)
  is_clear = values[:, 0] - values[:, 1] > 0.1
  for before, after in zip(
    leading_directions(core), leading_directions(core + noise), strict=True
  ):
    assert np.abs(np.asarray(before) - after)[is_clear].max() < 1e-2


def test_equal_singular_values_give_no_nan():
  for core in (np.eye(2), np.zeros((2, 2)), np.array([[0.0, 1], [1, 0]])):
    core = core.astype(np.float32)
    u, t = leading_directions(core[None])
    np.testing.assert_allclose(np.linalg.norm(u), 1, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(t), 1, rtol=1e-6)
    _, gradient = loss_and_gradient(core[None, None], 0.15)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
  ('lower', 'expected'), [(0.5, 0.1225), (0.15, 0.0), (0.1, 0.0)]
)
def test_lower_singular_loss(lower, expected):
  cores = np.stack([np.diag([1.0, lower])] * 2)[:, None] / 2
  loss, _ = loss_and_gradient(cores.astype(np.float32), 0.15)
  np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-12)
  loss, _ = loss_and_gradient(np.ones((1, 1, 1, 1), np.float32), 0.15)
  assert loss == 0


def test_lower_singular_loss_has_the_gradient_of_svd():
  cores = _normal(2, 4, 2, 2, seed=3)

  def by_svd(cores):
    values = jnp.linalg.svd(cores.sum(0), compute_uv=False)
    return (jnp.maximum(values[:, 1:] - 0.15, 0) ** 2).sum(-1).mean()

  np.testing.assert_allclose(
    loss_and_gradient(cores, 0.15)[1],
    jax.jit(jax.grad(by_svd))(cores),
    atol=1e-5,
  )
