# SPDX-License-Identifier: Apache-2.0
"""Routing by its formulas; what is sent to experts comes back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxsparse.config.errors import UserError
from jaxsparse.ops.experts import routing

T, X, k, D = 12, 6, 3, 4

# Compiled as a whole: op by op takes seconds.
load_balance_loss = jax.jit(routing.load_balance_loss)
dispatch_order = jax.jit(
  routing.dispatch_order, static_argnums=1, static_argnames='first_expert'
)


def draw(*shape, seed=0):
  x = np.random.default_rng(seed).normal(size=shape)
  return jax.device_put(x.astype(np.float32))


def softmax(logits):
  weights = np.exp(np.asarray(logits))
  return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize('kind', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('normalize', [True, False])
@pytest.mark.parametrize('has_bias', [True, False])
def test_route_equals_its_reference(kind, normalize, has_bias):
  logits, cotangent = draw(T, X), draw(T, k, seed=1)
  bias = draw(X, seed=2) if has_bias else None
  keywords = dict(kind=kind, normalize=normalize, bias=bias)

  def run(route, logits):
    weights, vjp, experts = jax.vjp(
      lambda logits: route(logits, k, **keywords), logits, has_aux=True
    )
    return weights, experts, vjp(cotangent)[0]

  @jax.jit
  def both(logits):
    return run(routing.route, logits), run(routing.route_reference, logits)

  results = both(logits)
  for actual, expected in zip(*results, strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
  if normalize:
    weights = np.asarray(results[0][0])
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_a_bias_moves_the_choice_and_not_the_weights():
  logits, bias = draw(T, X), 10 * np.eye(X, dtype=np.float32)[2]

  @jax.jit
  def run(bias):
    def total(bias):
      return routing.route(logits, k, bias=bias)[0].sum()

    routed = routing.route(logits, k, normalize=False, bias=bias)
    return *routed, jax.grad(total)(bias)

  weights, experts, d_bias = map(np.asarray, run(bias))
  assert (experts[:, 0] == 2).all()
  np.testing.assert_allclose(weights[:, 0], softmax(logits)[:, 2], rtol=1e-6)
  assert (d_bias == 0).all()


def test_unknown_router():
  with pytest.raises(UserError, match="router = 'tanh' must be one of"):
    routing.route(draw(T, X), k, kind='tanh')


@pytest.mark.parametrize('num_experts_per_token', [1, 3])
def test_load_balance_loss_is_1_when_even_and_grows_with_skew(
  num_experts_per_token,
):
  even = np.full((T, X), 1 / X, np.float32)
  load = np.full(X, T * num_experts_per_token // X, np.int32)
  assert load_balance_loss(even, load) == pytest.approx(1)
  is_chosen = np.arange(X) < num_experts_per_token
  skewed = np.tile(is_chosen / np.float32(num_experts_per_token), (T, 1))
  load = (T * is_chosen).astype(np.int32)
  loss = load_balance_loss(skewed.astype(np.float32), load)
  assert loss == pytest.approx(X / num_experts_per_token)


def test_load_balance_loss_is_the_formula_of_switch():
  logits = np.asarray(draw(T, X))
  shares, chosen = softmax(logits), np.argmax(logits, -1)
  expected = 0.0
  for i in range(X):
    f = sum(int(c) == i for c in chosen) / T
    expected += X * f * float(sum(shares[:, i])) / T
  load = np.bincount(chosen, minlength=X).astype(np.int32)
  loss = load_balance_loss(shares, load)
  assert loss == pytest.approx(expected, rel=1e-5)


def test_router_z_loss():
  logits = draw(2, T, X)
  expected = np.log(np.exp(np.asarray(logits)).sum(-1)) ** 2
  loss = jax.jit(routing.router_z_loss)(logits)
  assert loss == pytest.approx(expected.mean())


def test_bias_term_is_zero_and_its_gradient_is_the_excess_of_load():
  load = np.array([3, 0, 1], np.int32)
  value, gradient = jax.jit(jax.value_and_grad(routing.bias_balance_term))(
    np.array([0.5, -1.0, 2.0], np.float32), load
  )
  assert value == 0
  np.testing.assert_allclose(gradient, [5 / 12, -1 / 3, -1 / 12], rtol=1e-6)


def test_signs_of_the_bias_gradient_even_the_load():
  """Experts with a head start in every score lose it to their bias."""
  head_start = jnp.linspace(0, 2, X)

  @jax.jit
  def step(bias, seed):
    logits = (
      jax.random.normal(jax.random.key(seed), (256, X)) + head_start[None]
    )
    _, experts = routing.route(logits, 2, kind='sigmoid', bias=bias)
    load = jnp.bincount(experts.reshape(-1), length=X).astype(jnp.int32)
    gradient = jax.grad(routing.bias_balance_term)(bias, load)
    return bias - 0.01 * jnp.sign(gradient), load.max() * X / load.sum()

  bias, before = step(np.zeros(X, np.float32), 0)
  for seed in range(1, 80):
    bias, after = step(bias, seed)
  assert before > 1.7
  assert after < 1.25


@pytest.mark.parametrize(
  'experts', ['random', 'one expert', 'every other', 'none here']
)
def test_dispatch_sorts_by_expert(experts):
  rng = np.random.default_rng(0)
  ids = {
    'random': rng.integers(X, size=(T, k)),
    'one expert': np.full((T, k), X - 1),
    'every other': 2 * rng.integers(X // 2, size=(T, k)),
    'none here': np.full((T, k), X),
  }[experts]
  dispatch = dispatch_order(ids.astype(np.int32), X)
  flat = ids.reshape(-1)
  np.testing.assert_array_equal(dispatch.order, np.argsort(flat, kind='stable'))
  np.testing.assert_array_equal(
    np.asarray(dispatch.order)[dispatch.inverse], np.arange(T * k)
  )
  expected = np.bincount(flat[flat < X], minlength=X)
  np.testing.assert_array_equal(dispatch.sizes, expected)


def test_dispatch_to_some_of_the_experts():
  experts = np.array([[5, 2], [3, 0], [2, 3]], np.int32)
  dispatch = dispatch_order(experts, 2, first_expert=2)
  np.testing.assert_array_equal(dispatch.sizes, [2, 2])
  np.testing.assert_array_equal(dispatch.order, [1, 4, 2, 5, 0, 3])


def test_there_and_back_is_the_identity():
  """With weights that sum to 1, experts that do nothing change nothing."""
  x = draw(T, D)
  weights, experts = jax.jit(lambda x: routing.route(x, k))(draw(T, X, seed=1))
  dispatch = dispatch_order(experts, X)
  to_experts = jax.jit(lambda x: routing.to_experts(x, dispatch, k))

  @jax.jit
  def there_and_back(x, weights):
    rows = routing.to_experts(x, dispatch, k)
    return routing.from_experts(rows, weights, dispatch)

  np.testing.assert_allclose(there_and_back(x, weights), x, rtol=1e-5)
  check_grads(there_and_back, (x, weights), 1, ['rev'], 1e-2, 1e-2)
  x, rows, order = map(np.asarray, (x, to_experts(x), dispatch.order))
  experts = np.asarray(experts).reshape(-1)
  in_order = np.sort(experts, kind='stable')
  for row, assignment, expert in zip(rows, order, in_order, strict=True):
    np.testing.assert_array_equal(row, x[assignment // k])
    assert experts[assignment] == expert
