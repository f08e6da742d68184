# SPDX-License-Identifier: Apache-2.0
"""Norm, embedding, MLP and dropout by their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.nn.layers import MLP, Embed, RMSNorm, dropout

KEY = jax.random.key(0)


def test_norm_divides_by_the_root_mean_square():
  x = jnp.array([[3.0, -4.0, 0.0, 0.0]])
  params = {'params': {'scale': jnp.array([1.0, 2.0, 1.0, 1.0])}}
  y = RMSNorm(epsilon=0.0).apply(params, x)
  np.testing.assert_allclose(y, [[1.2, -3.2, 0.0, 0.0]], rtol=1e-6)


def test_norm_keeps_its_statistics_in_float32():
  x = jax.random.normal(KEY, (4, 100)).astype(jnp.bfloat16)
  y, params = RMSNorm(dtype=jnp.bfloat16).init_with_output(KEY, x)
  assert params['params']['scale'].dtype == jnp.float32
  wide = x.astype(jnp.float32)
  wide *= jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + 1e-5)
  np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize('kind', ['swiglu', 'gelu', 'gelu_erf'])
def test_mlp_is_its_formula(kind):
  x = jax.random.normal(KEY, (2, 3, 8))
  (y, metrics), params = jax.jit(MLP(16, kind).init_with_output)(KEY, x)
  p = params['params']
  up = x @ p['up']
  if kind == 'swiglu':
    gate = x @ p['gate']
    hidden = gate / (1 + jnp.exp(-gate)) * up
  elif kind == 'gelu_erf':
    hidden = 0.5 * up * (1 + jax.scipy.special.erf(up / np.sqrt(2)))
    assert 'gate' not in p
  else:
    cubic = np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)
    hidden = 0.5 * up * (1 + jnp.tanh(cubic))
    assert 'gate' not in p
  np.testing.assert_allclose(y, hidden @ p['down'], atol=1e-5)
  assert metrics == {}


def test_initial_variances():
  x = jax.random.normal(KEY, (1, 1, 512))
  params = MLP(1024, num_layers=8).init(KEY, x)['params']
  assert np.std(params['up']) == pytest.approx(512**-0.5, rel=0.02)
  assert np.std(params['down']) == pytest.approx(
    (2 * 8 * 1024) ** -0.5, rel=0.02
  )
  published = MLP(1024, deviations=(0.02, 0.0025)).init(KEY, x)['params']
  for name, deviation in (('gate', 0.02), ('up', 0.02), ('down', 0.0025)):
    assert np.std(published[name]) == pytest.approx(deviation, rel=0.02)
  embed = Embed(1000, 512)
  x, params = embed.init_with_output(KEY, jnp.arange(1000)[None])
  assert np.std(x) == pytest.approx(512**-0.5, rel=0.02)
  logits = embed.apply(
    params, jax.random.normal(KEY, (1, 50, 512)), method='logits'
  )
  assert logits.dtype == jnp.float32
  assert np.std(logits) == pytest.approx(1.0, rel=0.02)


def test_dropout_keeps_the_mean():
  y = dropout(jnp.ones((4, 50, 64)), 0.25, KEY)
  assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
  assert np.mean(y) == pytest.approx(1.0, abs=0.02)
