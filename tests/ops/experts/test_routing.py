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


def draw(*shape, seed=0, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize('kind', ['softmax', 'sigmoid'])
@pytest.mark.parametrize('normalize', [True, False])
@pytest.mark.parametrize('has_bias', [True, False])
def test_route_equals_its_reference(kind, normalize, has_bias):
  logits, cotangent = draw(T, X), draw(T, k, seed=1)
  bias = draw(X, seed=2) if has_bias else None
  keywords = dict(kind=kind, normalize=normalize, bias=bias)
  results = []
  for function in routing.route, routing.route_reference:

    @jax.jit
    def run(logits, route=function):
      weights, vjp, experts = jax.vjp(
        lambda logits: route(logits, k, **keywords), logits, has_aux=True
      )
      return weights, experts, vjp(cotangent)[0]

    results.append(run(logits))
  for actual, expected in zip(*results, strict=True):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
  if normalize:
    np.testing.assert_allclose(results[0][0].sum(-1), 1, rtol=1e-6)


def test_a_bias_moves_the_choice_and_not_the_weights():
  logits, bias = draw(T, X), jnp.zeros(X).at[2].set(10.0)
  weights, experts = routing.route(logits, k, normalize=False, bias=bias)
  assert (experts[:, 0] == 2).all()
  np.testing.assert_allclose(
    weights[:, 0], jax.nn.softmax(logits)[:, 2], rtol=1e-6
  )
  d_bias = jax.grad(lambda b: routing.route(logits, k, bias=b)[0].sum())(bias)
  assert (d_bias == 0).all()


def test_unknown_router():
  with pytest.raises(UserError, match="router = 'tanh' must be one of"):
    routing.route(draw(T, X), k, kind='tanh')


@pytest.mark.parametrize('num_experts_per_token', [1, 3])
def test_load_balance_loss_is_1_when_even_and_grows_with_skew(
  num_experts_per_token,
):
  even = jnp.full((T, X), 1 / X)
  load = jnp.full(X, T * num_experts_per_token // X, jnp.int32)
  assert routing.load_balance_loss(even, load) == pytest.approx(1)
  skewed = (
    jnp.zeros((T, X))
    .at[:, :num_experts_per_token]
    .set(1 / num_experts_per_token)
  )
  load = jnp.zeros(X, jnp.int32).at[:num_experts_per_token].set(T)
  loss = routing.load_balance_loss(skewed, load)
  assert loss == pytest.approx(X / num_experts_per_token)


def test_load_balance_loss_is_the_formula_of_switch():
  logits = draw(T, X)
  shares, chosen = jax.nn.softmax(logits), jnp.argmax(logits, -1)
  expected = 0.0
  for i in range(X):
    f = sum(int(c) == i for c in chosen) / T
    expected += X * f * float(sum(shares[:, i])) / T
  load = jnp.bincount(chosen, length=X).astype(jnp.int32)
  loss = routing.load_balance_loss(shares, load)
  assert loss == pytest.approx(expected, rel=1e-5)


def test_router_z_loss():
  logits = draw(2, T, X)
  expected = np.log(np.exp(np.asarray(logits)).sum(-1)) ** 2
  assert routing.router_z_loss(logits) == pytest.approx(expected.mean())


def test_bias_term_is_zero_and_its_gradient_is_the_excess_of_load():
  load = jnp.array([3, 0, 1], jnp.int32)
  value, gradient = jax.value_and_grad(routing.bias_balance_term)(
    jnp.array([0.5, -1.0, 2.0]), load
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

  bias, before = step(jnp.zeros(X), 0)
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
  dispatch = routing.dispatch_order(jnp.asarray(ids, jnp.int32), X)
  flat = ids.reshape(-1)
  np.testing.assert_array_equal(dispatch.order, np.argsort(flat, kind='stable'))
  np.testing.assert_array_equal(
    np.asarray(dispatch.order)[dispatch.inverse], np.arange(T * k)
  )
  expected = np.bincount(flat[flat < X], minlength=X)
  np.testing.assert_array_equal(dispatch.sizes, expected)


def test_dispatch_to_some_of_the_experts():
  experts = jnp.array([[5, 2], [3, 0], [2, 3]], jnp.int32)
  dispatch = routing.dispatch_order(experts, 2, first_expert=2)
  np.testing.assert_array_equal(dispatch.sizes, [2, 2])
  np.testing.assert_array_equal(dispatch.order, [1, 4, 2, 5, 0, 3])


def test_there_and_back_is_the_identity():
  """With weights that sum to 1, experts that do nothing change nothing."""
  x = draw(T, D)
  weights, experts = routing.route(draw(T, X, seed=1), k)
  dispatch = routing.dispatch_order(experts, X)

  @jax.jit
  def there_and_back(x, weights):
    rows = routing.to_experts(x, dispatch, k)
    return routing.from_experts(rows, weights, dispatch)

  np.testing.assert_allclose(there_and_back(x, weights), x, rtol=1e-5)
  check_grads(there_and_back, (x, weights), 1, ['rev'], 1e-2, 1e-2)
  rows = routing.to_experts(x, dispatch, k)
  in_order = np.sort(np.asarray(experts).reshape(-1), kind='stable')
  for row, assignment, expert in zip(
    rows, dispatch.order, in_order, strict=True
  ):
    np.testing.assert_array_equal(row, x[assignment // k])
    assert experts.reshape(-1)[assignment] == expert
