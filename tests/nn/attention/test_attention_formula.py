# SPDX-License-Identifier: Apache-2.0
"""Attention is its formula, slopes and all, as published models have it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import draw

from jaxsparse.config import ModelConfig, RopeScalingConfig
from jaxsparse.nn.attention import rotation
from jaxsparse.nn.attention.layer import Attention
from jaxsparse.ops.attention.dense import attention_reference
from jaxsparse.ops.attention.rope import apply_rope_reference

B, T, D = 2, 6, 12
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
POSITIONS = np.tile(np.arange(T, dtype=np.int32), (B, 1))
SEGMENTS = np.ones_like(POSITIONS)
SHAPES = dict(query=(D, 4, 4), key=(D, 2, 4), value=(D, 2, 4), output=(4, 4, D))
BIASES = dict(query_bias=(4, 4), key_bias=(2, 4), value_bias=(2, 4))
LLAMA3 = RopeScalingConfig(original_length=32)


@pytest.mark.parametrize(
  ('fields', 'more'),
  [
    ({}, {}),
    (dict(qk_norm='head'), dict(query_norm=(4,), key_norm=(4,))),
    (
      dict(qk_norm='projection', bias='qkv', rope_scaling=LLAMA3),
      BIASES | dict(query_norm=(4, 4), key_norm=(2, 4)),
    ),
  ],
  ids=['plain', 'head', 'projection'],
)
def test_is_its_formula(fields, more):
  config = ModelConfig(
    model_dim=D, num_heads=4, num_kv_heads=2, head_dim=4, norm_epsilon=1e-6,
    **fields,
  )  # fmt: skip
  module = Attention(config)
  inputs = X, POSITIONS, SEGMENTS
  params = draw(module.init, *inputs)
  p = params['params']
  shapes = jax.tree.map(np.shape, p)
  for name in shapes.keys() & {'query_norm', 'key_norm'}:
    shapes[name] = shapes[name]['scale']
  assert shapes == SHAPES | more
  axes = -1 if config.qk_norm == 'head' else (-2, -1)

  def heads_of(p, name):
    heads = jnp.einsum('btd,dnh->btnh', X, p[name])
    if f'{name}_bias' in p:
      heads += p[f'{name}_bias'][None, None]
    if f'{name}_norm' in p:
      heads /= jnp.sqrt(jnp.square(heads).mean(axes, keepdims=True) + 1e-6)
      heads *= jnp.broadcast_to(p[f'{name}_norm']['scale'], heads.shape)
    return heads

  def formula(p, _, positions, segments):
    query, key, value = (heads_of(p, n) for n in ('query', 'key', 'value'))
    scaling = rotation.settings(config)['scaling']
    query, key = (
      apply_rope_reference(x, positions, scaling=scaling) for x in (query, key)
    )
    ids = (positions, positions, segments, segments)
    encoded = attention_reference(query, key, value, *ids)
    return jnp.einsum('btnh,nhd->btd', encoded, p['output'])

  def layer(p, *inputs):
    y, cache, _ = module.apply({'params': p}, *inputs)
    assert cache is None
    return y

  def run(function):
    def loss(p, *inputs):
      y = function(p, *inputs)
      return jnp.sin(y).sum(), y

    return jax.jit(jax.grad(loss, has_aux=True))(p, *inputs)

  (slopes, y), (expected_slopes, expected) = run(layer), run(formula)
  np.testing.assert_allclose(y, expected, atol=1e-5)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=3e-5, rtol=1e-5),
    slopes,
    expected_slopes,
  )
