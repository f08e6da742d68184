# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.ops.memory import tucker
from jaxsparse.ops.memory.tucker import (
  lower_singular_loss,
  singular_values,
  tucker_top_m_exhaustive_reference,
  tucker_top_m_two_stage_reference,
)

# Compiled as a whole: op by op takes seconds.
tucker_top_m = jax.jit(
  tucker.tucker_top_m, static_argnums=3, static_argnames='two_quadrants'
)
leading_directions = jax.jit(tucker.leading_directions)


def _inputs(T=5, H=2, Q=24, r=2, c=2, seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  return (
    jax.random.normal(keys[0], (T, H, Q, r)),
    jax.random.normal(keys[1], (T, H, Q, r)),
    jax.random.uniform(keys[2], (c, H, r, r)),
  )


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


@pytest.mark.parametrize(('r', 'c'), [(1, 1), (2, 1), (2, 2), (2, 3), (3, 2)])
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
    cores = jnp.ones_like(cores)  # rank 1: all winners have factors of one sign
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


@pytest.mark.parametrize(
  ('two_quadrants', 'low', 'high'), [(False, 0.40, 0.53), (True, 0.95, 1.0)]
)
def test_recall_of_gaussian_scores(two_quadrants, low, high):
  row, column, cores = _inputs(T=1, H=64, Q=512, c=1)
  _, address = tucker_top_m(row, column, cores, 32, two_quadrants=two_quadrants)
  _, expected = tucker_top_m_exhaustive_reference(row, column, cores, 32)
  assert low <= _recall(address, expected) <= high


def test_product_keys_are_a_special_case():
  """Row + column is rank 2 with an identity core and constant ranks."""
  s, t = (jax.random.normal(k, (3, 1, 20)) for k in
          jax.random.split(jax.random.key(0)))  # fmt: skip
  one = jnp.ones_like(s)
  scores, address = tucker_top_m(
    jnp.stack([s, one], -1),
    jnp.stack([one, t], -1),
    jnp.eye(2)[None, None],
    5,
    directions=(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]])),
  )
  total = (s[..., :, None] + t[..., None, :]).reshape(3, 1, -1)
  expected_scores, expected_address = jax.lax.top_k(total, 5)
  _assert_same_cells(
    (jax.nn.softmax(scores, axis=2), address),
    (jax.nn.softmax(expected_scores)[..., None], expected_address),
  )
  # With rank 1 a cell is a product, which is another model.
  scores, address = tucker_top_m(
    s[..., None], t[..., None], jnp.ones((1, 1, 1, 1)), 20
  )
  product = (s[..., :, None] * t[..., None, :]).reshape(3, 1, -1)
  expected_scores, expected_address = jax.lax.top_k(product, 20)
  _assert_same_cells(
    (scores, address), (expected_scores[..., None], expected_address)
  )
  assert not np.array_equal(address, jax.lax.top_k(total, 20)[1])


def test_cores_select_by_their_sum():
  row, column, cores = _inputs(c=1)
  scores, address = tucker_top_m(row, column, cores, 6)
  halves = jnp.concatenate([cores / 2, cores / 2])
  half_scores, half_address = tucker_top_m(row, column, halves, 6)
  np.testing.assert_array_equal(address, half_address)
  np.testing.assert_allclose(
    half_scores, jnp.repeat(scores / 2, 2, axis=-1), rtol=1e-5
  )


@pytest.mark.parametrize('two_quadrants', [False, True])
def test_gradients_equal_autodiff_of_the_kept_cells(two_quadrants):
  row, column, cores = _inputs()
  _, address = tucker_top_m(row, column, cores, 6, two_quadrants=two_quadrants)
  i, j = address // 24, address % 24
  factor = jnp.arange(1.0, 13.0).reshape(1, 1, 6, 2)

  def loss(row, column, cores):
    scores, _ = tucker_top_m(row, column, cores, 6, two_quadrants=two_quadrants)
    return (scores * factor).sum()

  def expected(row, column, cores):
    grid = jnp.einsum('thip,chpq,thjq->thijc', row, cores, column)
    t, h = jnp.ogrid[:5, :2]
    kept = grid[t[..., None], h[..., None], i, j]
    return (kept * factor).sum()

  for actual, wanted in zip(
    jax.jit(jax.grad(loss, (0, 1, 2)))(row, column, cores),
    jax.jit(jax.grad(expected, (0, 1, 2)))(row, column, cores),
    strict=True,
  ):
    np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-4)


def test_tiles_of_tokens_change_nothing(monkeypatch):
  row, column, cores = _inputs(T=7)
  whole = tucker_top_m(row, column, cores, 6)
  monkeypatch.setattr(tucker, '_TILE_CELLS', 2 * 36 * 3)
  tiled = tucker.tucker_top_m(row, column, cores, 6)
  jax.tree.map(np.testing.assert_array_equal, whole, tiled)


@pytest.mark.parametrize('seed', range(3))
def test_directions_are_the_leading_singular_pair(seed):
  core = jax.random.normal(jax.random.key(seed), (50, 2, 2))
  u, t = leading_directions(core)
  left, values, right = jnp.linalg.svd(core)
  projection = jnp.einsum('hi,hj->hij', u, t) * values[:, :1, None]
  expected = left[:, :, :1] * values[:, None, :1] * right[:, :1, :]
  np.testing.assert_allclose(projection, expected, atol=2e-5)
  assert (u.sum(-1) + t.sum(-1) >= 0).all()
  np.testing.assert_allclose(singular_values(core), values, atol=2e-6)


@pytest.mark.parametrize('r', [2, 3])
def test_directions_are_continuous(r):
  core = jax.random.uniform(jax.random.key(0), (200, r, r))
  noise = 1e-4 * jax.random.normal(jax.random.key(1), core.shape)
  values = singular_values(core)
  is_clear = values[:, 0] - values[:, 1] > 0.1
  for before, after in zip(
    leading_directions(core), leading_directions(core + noise), strict=True
  ):
    assert float(jnp.abs(before - after)[is_clear].max()) < 1e-2


def test_equal_singular_values_give_no_nan():
  for core in (jnp.eye(2), jnp.zeros((2, 2)), jnp.array([[0.0, 1], [1, 0]])):
    u, t = leading_directions(core[None])
    np.testing.assert_allclose(jnp.linalg.norm(u), 1, rtol=1e-6)
    np.testing.assert_allclose(jnp.linalg.norm(t), 1, rtol=1e-6)
    gradient = jax.grad(lambda c: lower_singular_loss(c, 0.15))(
      core[None, None]
    )
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
  ('lower', 'expected'), [(0.5, 0.1225), (0.15, 0.0), (0.1, 0.0)]
)
def test_lower_singular_loss(lower, expected):
  cores = jnp.stack([jnp.diag(jnp.array([1.0, lower]))] * 2)[:, None] / 2
  np.testing.assert_allclose(
    lower_singular_loss(cores, 0.15), expected, rtol=1e-5, atol=1e-12
  )
  assert lower_singular_loss(jnp.ones((1, 1, 1, 1)), 0.15) == 0


def test_lower_singular_loss_has_the_gradient_of_svd():
  cores = jax.random.normal(jax.random.key(3), (2, 4, 2, 2))

  def by_svd(cores):
    values = jnp.linalg.svd(cores.sum(0), compute_uv=False)
    return (jnp.maximum(values[:, 1:] - 0.15, 0) ** 2).sum(-1).mean()

  np.testing.assert_allclose(
    jax.grad(lambda c: lower_singular_loss(c, 0.15))(cores),
    jax.grad(by_svd)(cores),
    atol=1e-5,
  )
