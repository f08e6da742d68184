"""The attention module: its formula, its cache, its normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.config import ModelConfig
from jaxsparse.nn.attention import (
  Attention,
  extend,
  init_key_values,
  init_positions,
)
from jaxsparse.ops.attention import attention_reference
from jaxsparse.ops.rope import apply_rope_reference

KEY = jax.random.key(0)
B, T, D = 2, 6, 12
POSITIONS = jnp.tile(jnp.arange(T), (B, 1))
SEGMENTS = jnp.ones((B, T), jnp.int32)
X = jax.random.normal(KEY, (B, T, D))


def make_config(**fields):
  sizes = dict(model_dim=D, num_heads=4, num_kv_heads=2, head_dim=4)
  return ModelConfig(**(sizes | fields))


@pytest.mark.parametrize('use_qk_norm', [False, True])
def test_is_its_formula(use_qk_norm):
  config = make_config(use_qk_norm=use_qk_norm, norm_epsilon=1e-6)
  module = Attention(config)
  init = jax.jit(module.init_with_output)
  (y, cache, _), params = init(KEY, X, POSITIONS, SEGMENTS)
  assert cache is None
  p = params['params']
  shapes = {n: p[n].shape for n in ('query', 'key', 'value', 'output')}
  assert shapes == dict(
    query=(D, 4, 4), key=(D, 2, 4), value=(D, 2, 4), output=(4, 4, D)
  )
  query, key, value = (
    jnp.einsum('btd,dnh->btnh', X, p[n]) for n in ('query', 'key', 'value')
  )
  if use_qk_norm:
    query, key = (
      x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
      for x in (query, key)
    )
  query, key = (apply_rope_reference(x, POSITIONS) for x in (query, key))
  ids = (POSITIONS, POSITIONS, SEGMENTS, SEGMENTS)
  encoded = attention_reference(query, key, value, *ids)
  expected = jnp.einsum('btnh,nhd->btd', encoded, p['output'])
  np.testing.assert_allclose(y, expected, atol=1e-5)


def test_a_cache_read_in_chunks_gives_the_same():
  module = Attention(make_config(use_qk_norm=True))
  init = jax.jit(module.init_with_output)
  (expected, _, _), params = init(KEY, X, POSITIONS, SEGMENTS)
  apply = jax.jit(module.apply)
  cache = init_positions(B, 9) | init_key_values(module.config, B, 9)
  outputs = []
  for part in (slice(0, 3), slice(3, 4), slice(4, 5), slice(5, 6)):
    inputs = (array[:, part] for array in (X, POSITIONS, SEGMENTS))
    y, cache, _ = apply(params, *inputs, cache)
    outputs.append(y)
  assert cache['index'] == T
  np.testing.assert_allclose(
    np.concatenate(outputs, axis=1), expected, atol=1e-5
  )


def test_extend_writes_in_order():
  cache = init_positions(1, 4)
  one = jnp.ones((1, 1), jnp.int32)
  for i in range(3):
    cache = extend(cache, positions=i * one, segment_ids=one)
  np.testing.assert_array_equal(cache['positions'], [[0, 1, 2, 0]])
  np.testing.assert_array_equal(cache['segment_ids'], [[1, 1, 1, 0]])
