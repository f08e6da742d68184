# SPDX-License-Identifier: Apache-2.0
"""Padding counts nowhere: neither in what layers report nor in what they add.

Each layer is run on rows that are part padding, and on the same tokens alone.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from lanes import few
from parameters import draw

from jaxsparse import mesh as mesh_lib
from jaxsparse.config import (
  MemoryConfig,
  ModelConfig,
  SparseAttentionConfig,
)
from jaxsparse.config.model import MoEConfig
from jaxsparse.nn.experts import MoE
from jaxsparse.nn.memory.layer import MemoryLayer
from jaxsparse.nn.transformer import Transformer
from jaxsparse.ops.experts import routing
from jaxsparse.ops.memory import usage

KEY = jax.random.key(0)
B, T, D, LENGTH = 4, 16, 8, 8
MOE = MoEConfig(
  num_experts=8, num_experts_per_token=2, expert_dim=6, balance_loss_weight=0.1,
  router_z_loss_weight=0.1, bias_update_rate=0.01,
)  # fmt: skip
MEMORY = MemoryConfig(num_keys=8, key_dim=4, num_selected=4, value_dim=8)
LAYERS = dict(
  moe=MoE(MOE),
  moe_by_sigmoid=MoE(dataclasses.replace(MOE, router='sigmoid')),
  memory=MemoryLayer(MEMORY),
  memory_of_sums=MemoryLayer(dataclasses.replace(MEMORY, grid='additive')),
)
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
# Every row has its own padding, before, after and between.
IS_TOKEN = np.zeros((B, T), bool)
for row, place in enumerate((slice(0, 8), slice(8, 16), slice(4, 12))):
  IS_TOKEN[row, place] = True
IS_TOKEN[3, ::2] = True
SEGMENTS = IS_TOKEN.astype(np.int32)
TOKENS_ALONE = X[IS_TOKEN].reshape(B, LENGTH, D)


def run(layer, params, x, segment_ids):
  """Gradients of the losses by parameters and inputs, and metrics."""

  def loss(params, x):
    _, metrics = layer.apply(params, x, segment_ids)
    return metrics['aux_loss'], metrics

  return jax.grad(loss, (0, 1), has_aux=True)(params, x)


@functools.cache
def compiled(name):
  return jax.jit(functools.partial(run, LAYERS[name]))


@functools.cache
def expected(name):
  """Of the tokens alone: parameters, metrics, gradients of both."""
  params = draw(LAYERS[name].init, X)
  ones = np.ones((B, LENGTH), np.int32)
  return params, compiled(name)(params, TOKENS_ALONE, ones)


def check(actual, expected):
  gradients, metrics = actual
  (of_params, of_x), expected_metrics = expected
  assert_close = functools.partial(
    jax.tree.map,
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6),
  )
  assert_close(metrics, expected_metrics)
  assert_close(gradients[0], of_params)
  assert_close(np.asarray(gradients[1])[IS_TOKEN].reshape(of_x.shape), of_x)
  assert (np.asarray(gradients[1])[~IS_TOKEN] == 0).all()


@pytest.mark.parametrize('name', few(['moe', 'memory'], LAYERS))
def test_metrics_and_losses_are_those_of_the_tokens_alone(name):
  params, results = expected(name)
  check(compiled(name)(params, X, SEGMENTS), results)
  # What padding holds is of no influence.
  other = np.where(IS_TOKEN[..., None], X, np.float32(9))
  check(compiled(name)(params, other, SEGMENTS), results)


@pytest.mark.parametrize(
  ('sizes', 'name'),
  few(
    [((2, 2, 1), 'moe'), ((1, 2, 2), 'memory')],
    itertools.product([(2, 2, 1), (1, 2, 2)], ['moe', 'memory']),
  ),
)
def test_devices_with_unequal_padding_weigh_by_their_tokens(name, sizes):
  params, _ = expected(name)
  layer = LAYERS[name]
  segment_ids = SEGMENTS * (np.arange(B) >= 2)[:, None].astype(np.int32)
  whole = compiled(name)(params, X, segment_ids)
  mesh = mesh_lib.make_mesh(*sizes, devices=jax.devices()[:4])
  with jax.set_mesh(mesh):

    @jax.jit
    def on_mesh(params, x, segment_ids):
      x = mesh_lib.reshard(x, mesh_lib.act('BTD'))
      segment_ids = mesh_lib.reshard(segment_ids, mesh_lib.act('BT'))
      shapes = jax.eval_shape(lambda x: layer.init(KEY, x), x)
      specs = jax.tree.map(lambda x: x.sharding.spec, shapes)
      params = jax.tree.map(mesh_lib.reshard, params, specs)
      return run(layer, params, x, segment_ids)

    actual = on_mesh(params, X, segment_ids)
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-6),
    actual,
    whole,
  )


@pytest.mark.parametrize('name', few(['moe', 'memory'], LAYERS))
def test_nothing_but_padding_is_nothing(name):
  params, _ = expected(name)
  nothing = np.zeros_like(SEGMENTS)
  gradients, metrics = compiled(name)(params, X, nothing)
  of_parameters = {'aux_loss', 'core_singular_0', 'core_singular_1'}
  for metric in metrics.keys() - of_parameters:
    assert metrics[metric] == 0, metric
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
  assert (gradients[1] == 0).all()


MODEL = ModelConfig(
  num_layers=1, model_dim=D, num_heads=2, num_kv_heads=2, head_dim=4,
  mlp_dim=16, vocab_size=30, mlp='gelu',
)  # fmt: skip
SPARSE = SparseAttentionConfig(
  block=2, tile=2, window_blocks=1, max_blocks=2, min_blocks=1,
  sparsity_loss_weight=0.1,
)  # fmt: skip
MODELS = dict(
  moe=dict(moe=MOE),
  memory=dict(
    memory=dataclasses.replace(MEMORY, query_conv_taps=3, placements=((0, 0),))
  ),
  sparse=dict(attention_pattern=('sparse',), sparse=SPARSE),
)
MODELS['all'] = MODELS['moe'] | MODELS['memory'] | MODELS['sparse']


@pytest.mark.parametrize('name', few(['all'], MODELS))
def test_a_models_metrics_are_those_of_its_tokens(name):
  """Padding after each row, and rows of padding: as a last batch has it."""
  config = dataclasses.replace(MODEL, **MODELS[name])
  module = Transformer(config)
  rng = np.random.default_rng(0)
  tokens = rng.integers(3, size=(2, 12), dtype=np.int32)
  positions = np.tile(np.arange(12, dtype=np.int32), (2, 1))
  segment_ids = np.ones_like(tokens)
  params = draw(module.init, tokens, positions, segment_ids)

  @jax.jit
  def gradients(params, *inputs):
    def loss(params):
      _, _, metrics = module.apply(params, *inputs)
      return metrics['aux_loss'] + metrics.get('sparsity_loss', 0.0), metrics

    return jax.grad(loss, has_aux=True)(params)

  alone = gradients(params, tokens, positions, segment_ids)
  padded = [
    np.pad(x, ((0, 2), (0, 6))) for x in (tokens, positions, segment_ids)
  ]
  # Other tokens than all others, whose figures are other extremes.
  is_padding = padded[2] == 0
  others = rng.integers(3, 30, size=padded[0].shape, dtype=np.int32)
  padded[0] = np.where(is_padding, others, padded[0])
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5),
    gradients(params, *padded),
    alone,
  )


def test_hits_and_means_leave_out_what_is_no_token():
  rng = np.random.default_rng(0)

  @jax.jit
  def found(x, slot, is_token, alone):
    return (
      usage.mean_over_tokens(x, is_token),
      usage.count_uses(slot, 7, is_token),
      routing.router_z_loss(x, is_token),
      routing.router_z_loss(alone),
    )

  for _ in range(5):
    is_token = rng.permutation(15).reshape(3, 5) < 8
    x = rng.normal(size=(3, 5, 4)).astype(np.float32)
    slot = rng.integers(7, size=(3, 5), dtype=np.int32)
    alone = x[is_token]
    mean, uses, loss, loss_alone = found(x, slot, is_token, alone)
    np.testing.assert_allclose(mean, alone.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
      uses, np.bincount(slot[is_token], minlength=7)
    )
    np.testing.assert_allclose(loss, loss_alone, rtol=1e-5)
