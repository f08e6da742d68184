# SPDX-License-Identifier: Apache-2.0
"""The mixture by its definition, and the same on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import payloads
from parameters import draw, place

from jaxsparse import mesh as mesh_lib
from jaxsparse.config.errors import UserError
from jaxsparse.config.model import MoEConfig
from jaxsparse.nn.experts import MoE
from jaxsparse.nn.layers import MLP
from jaxsparse.ops.experts.expert_mlp import (
  expert_mlp_reference,
  sharded_expert_mlp,
)
from jaxsparse.ops.experts.routing import route_reference

B, T, D = 8, 3, 8
KEY = jax.random.key(0)
CONFIG = MoEConfig(
  num_experts=8, num_experts_per_token=2, expert_dim=6, num_shared=1,
  router='sigmoid', balance_loss_weight=0.1, router_z_loss_weight=0.1,
  bias_update_rate=0.01,
)  # fmt: skip
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)


def init(layer, x=X):
  """Parameters, with a bias and a router that prefer some of the experts."""
  params = draw(layer.init, x)['params']
  if 'router_bias' in params:
    bias = np.linspace(-0.2, 0.2, layer.config.num_experts, dtype=np.float32)
    params['router_bias'] = bias
  return {'params': params}


def run(layer, params, x):
  """Output, metrics and gradients of a loss with the auxiliary one."""

  def loss(params, x):
    y, metrics = layer.apply(params, x)
    y = mesh_lib.reshard(y, mesh_lib.act('BTD'))
    weight = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    weight = mesh_lib.reshard(weight, mesh_lib.act('BTD'))
    return (y * weight).sum() + metrics['aux_loss'], (y, metrics)

  gradients, results = jax.grad(loss, (0, 1), has_aux=True)(params, x)
  return *results, *gradients


# OLMoE's: no bias, no shared expert, shares of all scores as they are.
SOFTMAX = dataclasses.replace(
  CONFIG, router='softmax', normalize_weights=False, num_shared=0,
  bias_update_rate=0.0,
)  # fmt: skip


@functools.cache
def expected(kind, config=CONFIG):
  layer = MoE(config, kind)
  params = init(layer)
  return params, jax.jit(functools.partial(run, layer))(params, X)


def check(actual, expected, **tolerance):
  tolerance = dict(rtol=1e-5, atol=1e-5) | tolerance
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, **tolerance), actual, expected
  )


@pytest.mark.parametrize(
  ('kind', 'changes'),
  [
    ('swiglu', dict(router='softmax', num_shared=0, bias_update_rate=0.0)),
    ('gelu_erf', dict(num_shared=2, normalize_weights=False)),
  ],
)
def test_mixture_is_its_definition(kind, changes):
  config = dataclasses.replace(CONFIG, **changes)
  layer = MoE(config, kind)
  params = init(layer)
  (y, metrics), state = jax.jit(
    functools.partial(layer.apply, mutable='intermediates')
  )(params, X)
  p = params['params']

  @jax.jit
  def definition(p, x):
    flat = x.reshape(-1, D)
    weights, experts = route_reference(
      flat @ p['router'],
      config.num_experts_per_token,
      kind=config.router,
      normalize=config.normalize_weights,
      bias=p.get('router_bias'),
    )
    names = ('gate', 'up', 'down') if kind == 'swiglu' else ('up', 'down')
    matrices = {name: p[name] for name in names}
    sums = expert_mlp_reference(
      flat, weights, experts, matrices, gelu=kind.removeprefix('gelu_')
    ).reshape(x.shape)
    if config.num_shared:
      width = config.num_shared * config.expert_dim
      sums += MLP(width, kind).apply({'params': p['shared']}, x)[0]
    return sums, experts

  sums, experts = definition(p, X)
  check(y, sums)
  assert ('router_bias' in p) == (config.bias_update_rate > 0)
  sown = state['intermediates']['experts'][0]
  np.testing.assert_array_equal(sown.reshape(experts.shape), experts)
  load = np.bincount(np.ravel(experts), minlength=8)
  assert metrics['usage_fraction'] == pytest.approx((load > 0).mean())
  assert metrics['usage_max'] == pytest.approx(load.max() / load.mean())
  assert 0 < metrics['router_entropy'] <= np.log(8)


def test_initial_variances():
  config = MoEConfig(num_experts=32, expert_dim=128)
  layer = MoE(config, num_layers=8)
  params = jax.jit(layer.init)(KEY, np.zeros((1, 1, 64), np.float32))['params']
  for name, variance in dict(
    router=1 / 64, gate=1 / 64, up=1 / 64, down=1 / (2 * 8 * 128)
  ).items():
    assert np.std(params[name]) == pytest.approx(variance**0.5, rel=0.05)


@pytest.mark.parametrize(
  ('sizes', 'is_partial', 'kind', 'config'),
  [
    pytest.param((8, 1, 1), False, 'gelu', CONFIG, marks=pytest.mark.slow),
    pytest.param((2, 4, 1), False, 'gelu', CONFIG, marks=pytest.mark.slow),
    ((2, 2, 2), True, 'gelu', CONFIG),
    pytest.param((1, 8, 1), False, 'gelu', CONFIG, marks=pytest.mark.slow),
    pytest.param((8, 1, 1), False, 'swiglu', SOFTMAX, marks=pytest.mark.slow),
    pytest.param((1, 4, 2), True, 'swiglu', SOFTMAX, marks=pytest.mark.slow),
    pytest.param((2, 2, 2), False, 'swiglu', SOFTMAX, marks=pytest.mark.slow),
  ],
)
def test_every_mesh_computes_the_same(sizes, is_partial, kind, config):
  params, results = expected(kind, config)
  layer = MoE(config, kind, is_partial=is_partial)
  with jax.set_mesh(mesh_lib.make_mesh(*sizes)):
    on_mesh = jax.jit(lambda params, x: run(layer, params, place_tokens(x)))
    placed = place(params, initial(layer), X)
    actual = on_mesh(placed, X)
  check(actual, results)
  got, specs = (
    jax.tree.map(lambda x: x.sharding.spec, tree)
    for tree in (actual[2], placed)
  )
  assert jax.tree.leaves(got) == jax.tree.leaves(specs)
  assert specs['params']['up'] == jax.P('sparse', 'data', 'model')


def test_a_mesh_adds_up_the_parts_of_swiglu():
  layer = MoE(CONFIG)
  params = init(layer)
  expected = jax.jit(layer.apply)(params, X)
  with jax.set_mesh(mesh_lib.make_mesh(1, 4, 2)):
    y, metrics = jax.jit(lambda p, x: layer.apply(p, place_tokens(x)))(
      params, X
    )
  check((y, metrics), expected)
  assert y.sharding.spec == jax.P(mesh_lib.TOKENS, None, None)


@pytest.mark.parametrize(('sizes', 'group'), [((1, 8, 1), 8), ((2, 2, 2), 2)])
def test_only_tokens_and_their_choices_are_sent(sizes, group):
  """Never experts; with `model`, each token's sum once more."""
  k = 2
  with jax.set_mesh(mesh_lib.make_mesh(*sizes)):
    tokens = jax.P(mesh_lib.TOKENS)
    args = [
      jax.ShapeDtypeStruct(shape, dtype, sharding=tokens)
      for shape, dtype in (
        ((B, T, D), jnp.float32),
        ((B, T, k), jnp.float32),
        ((B, T, k), jnp.int32),
      )
    ]
    matrices = {
      name: jax.ShapeDtypeStruct(
        (8, *shape), jnp.float32, sharding=mesh_lib.gathered(dims)
      )
      for name, dims, shape in (('up', 'XDF', (D, 6)), ('down', 'XFD', (6, D)))
    }
    program = jax.jit(sharded_expert_mlp).lower(*args, matrices).compile()
  here = B * T // (sizes[0] * sizes[1])
  expected = [
    ('all-gather', 'f32', group * here * D),
    ('all-gather', 'f32', group * here * k),
    ('all-gather', 's32', group * here * k),
    ('reduce-scatter', 'f32', here * D),
  ]
  if sizes[2] > 1:
    expected.append(('all-reduce', 'f32', here * D))
  assert payloads(program.as_text()) == sorted(expected)


def place_tokens(x):
  return mesh_lib.reshard(x, mesh_lib.act('BTD'))


def initial(layer):
  """The layer's own initial values, of tokens that lie on the mesh."""
  return lambda key, x: layer.init(key, place_tokens(x))


def test_initial_values_are_the_same_on_a_mesh():
  layer = MoE(CONFIG)
  params = jax.jit(layer.init)(KEY, X)
  with jax.set_mesh(mesh_lib.make_mesh(2, 2, 2)):
    placed = jax.jit(initial(layer))(KEY, X)
  check(placed, params, atol=0)


def test_under_remat():
  params, results = expected('gelu')
  layer = MoE(CONFIG, 'gelu')

  def loss(params, x):
    y, metrics = jax.checkpoint(layer.apply)(params, x)
    weight = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    return (y * weight).sum() + metrics['aux_loss']

  check(jax.jit(jax.grad(loss))(params, X), results[2])


def test_decoding_equals_the_whole_sequence():
  """One position has fewer assignments than experts, the whole has more."""
  params, (y, *_) = expected('gelu')
  step = jax.jit(MoE(CONFIG, 'gelu').apply)
  for t in range(T):
    for b in range(2):
      one, _ = step(params, X[b : b + 1, t : t + 1])
      check(one[0, 0], y[b, t])


def test_bf16_keeps_the_choice_of_experts():
  params, (y, metrics, *_) = expected('gelu')
  low, low_metrics = jax.jit(MoE(CONFIG, 'gelu', dtype=jnp.bfloat16).apply)(
    params, X
  )
  assert low.dtype == jnp.bfloat16
  check(np.asarray(low, np.float32), y, rtol=0.05, atol=0.05)
  check(low_metrics, metrics)


def test_the_bias_gets_the_load_as_its_gradient():
  """Steps against its sign pull an uneven load even, and nothing else moves."""
  config = dataclasses.replace(
    CONFIG, balance_loss_weight=0.0, router_z_loss_weight=0.0, num_shared=0
  )
  layer = MoE(config)
  x = np.random.default_rng(1).normal(0.7, size=(8, 32, D)).astype(np.float32)

  @jax.jit
  def step(params, x):
    def loss(params):
      _, metrics = layer.apply(params, x)
      return metrics['aux_loss'], metrics

    gradient, metrics = jax.grad(loss, has_aux=True)(params)
    params = jax.tree.map(lambda p, g: p - 0.01 * jnp.sign(g), params, gradient)
    return params, metrics

  params = start = draw(layer.init, x)
  start['params']['router_bias'] = np.zeros(8, np.float32)
  loads = []
  for _ in range(40):
    params, metrics = step(params, x)
    assert metrics['aux_loss'] == 0
    loads.append(float(metrics['usage_max']))
  del params['params']['router_bias'], start['params']['router_bias']
  check(params, start, atol=0)
  assert loads[0] > 1.5
  assert min(loads[-5:]) < 1.3


def test_uneven_splits_are_told_in_a_sentence():
  with jax.set_mesh(mesh_lib.make_mesh(1, 4, 2)):
    for changes in dict(num_experts=6), dict(expert_dim=5):
      config = dataclasses.replace(CONFIG, **changes)
      (name,) = changes
      with pytest.raises(UserError, match=f'{name} must be a multiple of'):
        MoE(config).init(KEY, place_tokens(jnp.asarray(X)))
