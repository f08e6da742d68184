# SPDX-License-Identifier: Apache-2.0
"""Norm, embedding, MLP and dropout by their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import draw

from jaxsparse.nn.layers import MLP, Embed, RMSNorm, dropout

KEY = jax.random.key(0)


def normal(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_norm_divides_by_the_root_mean_square():
  x = np.array([[3.0, -4.0, 0.0, 0.0]], np.float32)
  params = {'params': {'scale': np.array([1.0, 2.0, 1.0, 1.0], np.float32)}}
  y = jax.jit(RMSNorm(epsilon=0.0).apply)(params, x)
  np.testing.assert_allclose(y, [[1.2, -3.2, 0.0, 0.0]], rtol=1e-6)


def test_norm_keeps_its_statistics_in_float32():
  x = normal(4, 100).astype(jnp.bfloat16)
  norm = RMSNorm(dtype=jnp.bfloat16)
  y, params = jax.jit(norm.init_with_output)(KEY, x)
  assert params['params']['scale'].dtype == jnp.float32

  @jax.jit
  def formula(x):
    wide = x.astype(jnp.float32)
    wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-5)
    return wide.astype(jnp.bfloat16)

  np.testing.assert_array_equal(y, formula(x))


@pytest.mark.parametrize('kind', ['swiglu', 'gelu', 'gelu_erf'])
def test_mlp_is_its_formula(kind):
  x = normal(2, 3, 8)
  mlp = MLP(16, kind)
  p = draw(mlp.init, x)['params']
  y, metrics = jax.jit(mlp.apply)({'params': p}, x)
  up = x @ p['up']
  if kind == 'swiglu':
    gate = x @ p['gate']
    hidden = gate / (1 + np.exp(-gate)) * up
  elif kind == 'gelu_erf':
    hidden = 0.5 * up * (1 + np.vectorize(math.erf)(up / np.sqrt(2)))
    assert 'gate' not in p
  else:
    cubic = np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)
    hidden = 0.5 * up * (1 + np.tanh(cubic))
    assert 'gate' not in p
  np.testing.assert_allclose(y, hidden @ p['down'], atol=1e-5)
  assert metrics == {}


def test_initial_variances():
  x = normal(1, 1, 512)
  embed = Embed(1000, 512)

  @jax.jit
  def initial(x, y):
    params = MLP(1024, num_layers=8).init(KEY, x)['params']
    published = MLP(1024, deviations=(0.02, 0.0025)).init(KEY, x)['params']
    rows, of_embed = embed.init_with_output(KEY, jnp.arange(1000)[None])
    logits = embed.apply(of_embed, y, method='logits')
    return params, published, rows, logits

  params, published, rows, logits = initial(x, normal(1, 50, 512))
  assert np.std(params['up']) == pytest.approx(512**-0.5, rel=0.02)
  assert np.std(params['down']) == pytest.approx(
    (2 * 8 * 1024) ** -0.5, rel=0.02
  )
  for name, deviation in (('gate', 0.02), ('up', 0.02), ('down', 0.0025)):
    assert np.std(published[name]) == pytest.approx(deviation, rel=0.02)
  assert np.std(rows) == pytest.approx(512**-0.5, rel=0.02)
  assert logits.dtype == jnp.float32
  assert np.std(logits) == pytest.approx(1.0, rel=0.02)


def test_dropout_keeps_the_mean():
  ones = np.ones((4, 50, 64), np.float32)
  y = jax.jit(lambda x: dropout(x, 0.25, KEY))(ones)
  assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
  assert np.mean(y) == pytest.approx(1.0, abs=0.02)
