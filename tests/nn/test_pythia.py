# SPDX-License-Identifier: Apache-2.0
"""A block as Pythia has it, beside one written out in NumPy."""

import math

import jax
import numpy as np
import pytest
from parameters import draw
from recipes import RECIPES

from jaxsparse.analysis import cost
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import UserError
from jaxsparse.nn.transformer import Transformer

T, D, N, H, F, V = 6, 16, 2, 8, 24, 11
ROTATED = 4
CONFIG = ModelConfig(
  num_layers=1,
  model_dim=D,
  num_heads=N,
  num_kv_heads=N,
  head_dim=H,
  mlp_dim=F,
  vocab_size=V,
  mlp='gelu_erf',
  tie_embeddings=False,
  norm='layer',
  bias='all',
  parallel_block=True,
  rope_fraction=ROTATED / H,
)
TOKENS = np.array([[3, 1, 4, 1, 5, 9]], np.int32)


def make_params():
  """With biases, which begin at 0."""
  return draw(Transformer(CONFIG).init, TOKENS, TOKENS, TOKENS)['params']


def layer_norm(x, p):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
  return x * p['gain']['scale'] + p['bias']


def rotated(x):
  """x [T, N, H], of which the first coordinates are pairs (i, i + 2)."""
  half = ROTATED // 2
  angle = np.arange(T)[:, None] * 1e4 ** (-np.arange(half) / half)
  z = x[..., :half] + 1j * x[..., half:ROTATED]
  z = z * np.exp(1j * angle)[:, None]
  return np.concatenate([z.real, z.imag, x[..., ROTATED:]], axis=-1)


def forward(p):
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), p)
  x = p['embed']['table'][TOKENS[0]]
  block = p['block_00']
  h = layer_norm(x, block['attention_norm'])
  a = block['attention']
  q, k, v = (
    np.einsum('td,dnh->tnh', h, a[name]) + a[f'{name}_bias']
    for name in ('query', 'key', 'value')
  )
  scores = np.einsum('tnh,snh->nts', rotated(q), rotated(k)) / np.sqrt(H)
  weights = np.exp(scores) * np.tril(np.ones((T, T)))
  weights /= weights.sum(-1, keepdims=True)
  y = np.einsum('nts,snh,nhd->td', weights, v, a['output']) + a['output_bias']
  m = block['mlp']
  up = layer_norm(x, block['mlp_norm']) @ m['up'] + m['up_bias']
  hidden = 0.5 * up * (1 + np.vectorize(math.erf)(up / math.sqrt(2)))
  x = x + y + hidden @ m['down'] + m['down_bias']
  return layer_norm(x, p['final_norm']) @ p['output'].T


def test_it_is_its_formula():
  params = make_params()
  positions = np.arange(T, dtype=np.int32)[None]
  logits, _, _ = jax.jit(Transformer(CONFIG).apply)(
    {'params': params},
    TOKENS,
    positions,
    np.ones_like(positions),
  )
  np.testing.assert_allclose(np.asarray(logits)[0], forward(params), atol=2e-5)


def test_leaves_are_counted():
  leaves = jax.tree.leaves(make_params())
  assert sum(x.size for x in leaves) == cost.count_parameters(CONFIG).total


@pytest.mark.parametrize('fraction', [0.0, 0.05, 1.5, 0.375])
def test_an_odd_fraction_is_refused(fraction):
  with pytest.raises(UserError, match='rope_fraction'):
    ModelConfig(head_dim=H, rope_fraction=fraction)


@pytest.mark.parametrize('name', ['dcpythia:2b8', 'dcpythia:6b9'])
def test_recipes_have_its_mlp(name):
  assert RECIPES[name]().model.mlp == CONFIG.mlp
