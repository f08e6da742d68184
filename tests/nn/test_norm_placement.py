# SPDX-License-Identifier: Apache-2.0
"""Norms after attention and MLP, as OLMo 2 has them, and on any mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import draw, place

from jaxsparse import mesh
from jaxsparse.config import MemoryConfig, ModelConfig
from jaxsparse.nn.attention.layer import Attention
from jaxsparse.nn.layers import MLP
from jaxsparse.nn.memory.layer import MemoryLayer
from jaxsparse.nn.transformer import Transformer

V, F = 11, 16
CONFIG = ModelConfig(
  num_layers=1,
  model_dim=8,
  num_heads=4,
  num_kv_heads=4,
  head_dim=4,
  mlp_dim=F,
  vocab_size=V,
  norm_placement='post',
  qk_norm='projection',
  norm_epsilon=1e-6,
  memory=MemoryConfig(
    num_keys=4, key_dim=4, num_selected=3, value_dim=8, placements=((0, 0),)
  ),
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, V, (2, 5), np.int32)

# The programs run once.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def rms_norm(x, p):
  mean_square = jnp.square(x).mean(-1, keepdims=True)
  return x / jnp.sqrt(mean_square + 1e-6) * p['scale'][None, None]


def formula(p, tokens):
  """Of the layers, which have formulas of their own."""
  x = p['embed']['table'][tokens]
  block = p['block_00']
  attend, mlp, memory = Attention(CONFIG), MLP(F), MemoryLayer(CONFIG.memory)
  y, _, _ = attend.apply({'params': block['attention']}, x)
  x = x + rms_norm(y, block['attention_norm'])
  y, _ = mlp.apply({'params': block['mlp']}, x)
  # The memory reads the stream as it is, and what it adds stays as it is.
  read, _ = memory.apply({'params': block['memory']}, x)
  x = x + rms_norm(y, block['mlp_norm']) + read
  return rms_norm(x, p['final_norm']) @ p['embed']['table'].T


def model(p, tokens):
  return Transformer(CONFIG).apply({'params': p}, tokens)[0]


def run(function, params):
  """Logits, and the slopes of a sum of them."""

  def loss(p, tokens):
    logits = function(p, tokens)
    return jnp.sin(logits).sum(), logits

  return jit(jax.grad(loss, has_aux=True))(params, TOKENS)


def check(found, expected):
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-5),
    found,
    expected,
  )


@pytest.fixture(scope='module')
def params():
  return draw(Transformer(CONFIG).init, TOKENS)['params']


@pytest.fixture(scope='module')
def expected(params):
  return run(formula, params)


def test_it_is_its_formula(params, expected):
  check(run(model, params), expected)


def test_it_is_the_same_on_a_mesh(params, expected):
  """Each norm waits for the sum over the heads and the width of all devices."""
  with jax.set_mesh(mesh.make_mesh(2, 1, 4)):
    placed = place({'params': params}, Transformer(CONFIG).init, TOKENS)
    check(run(model, placed['params']), expected)
