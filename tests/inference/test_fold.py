# SPDX-License-Identifier: Apache-2.0
"""Parameters folded for decoding against those of the model."""

import dataclasses
import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from slot_models import BASE, MODELS, V, make_params, tolerance

from jaxsparse.config import ModelConfig
from jaxsparse.inference import weights
from jaxsparse.inference.fold import fold_for_decode
from jaxsparse.inference.quantize import Quantization, quantize
from jaxsparse.nn.transformer import Transformer, init_cache
from jaxsparse.ops.adapted_matrix import AdaptedMatrix

jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)

B, T = 2, 9

KINDS = MODELS | dict(
  gelu=dataclasses.replace(
    BASE, mlp='gelu', bias='all', tie_embeddings=False, qk_norm='head',
    num_layers=1,
  ),
  layer=dataclasses.replace(
    BASE, norm='layer', bias='all', tie_embeddings=False, mlp='gelu_erf',
    parallel_block=True, num_layers=1,
  ),
  parallel=dataclasses.replace(
    BASE, parallel_block=True, qk_norm='projection', bias='qkv', num_layers=1,
  ),
)  # fmt: skip


def forward(config, params, tokens):
  """Logits [B, T, V] by one call without a cache."""
  apply = jit(lambda *args: Transformer(config).apply(*args)[0])
  return np.asarray(apply({'params': params}, tokens))


def decoded(config, params, tokens):
  """Logits [B, T, V] of one token after another."""

  @jit
  def run(params, tokens):
    def step(cache, token):
      position = jnp.broadcast_to(cache['shared']['index'], (B, 1))
      logits, cache, _ = Transformer(config).apply(
        {'params': params}, token[:, None], position, None, cache
      )
      return cache, logits[:, 0]

    return jax.lax.scan(step, init_cache(config, B, T), tokens.T)[1]

  return np.asarray(run(params, tokens)).swapaxes(0, 1)


def tokens():
  return np.random.default_rng(7).integers(0, V, (B, T), np.int32)


def copied(params):
  """The tree anew, of the same arrays."""
  return jax.tree.map(lambda x: x, params)


@pytest.mark.parametrize('name', few(['small', 'gelu', 'few_experts'], KINDS))
def test_decoding_is_the_forward_pass(name):
  config = KINDS[name]
  params = make_params(config)['params']
  expected = forward(config, params, tokens())
  folded = fold_for_decode(config, copied(params))
  got = decoded(config, folded, tokens())
  atol = tolerance(config, 1e-5) * np.abs(expected).max()
  np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
  'name', few(['gelu'], ['gelu', 'dense', 'moe', 'convolved', 'pkm', 'dcmha'])
)
def test_in_bf16_they_differ_by_rounding(name):
  """By less than 6 % of the largest logit, which composed heads need.

  But for tokens that find another expert or slot, as rounding may have it.
  """
  config = dataclasses.replace(KINDS[name], dtype='bfloat16')
  params = make_params(KINDS[name])['params']
  expected = forward(config, params, tokens())
  folded = fold_for_decode(config, jax.tree.map(jnp.asarray, params))
  got = decoded(config, weights.cast(config, folded), tokens())
  error = np.abs(got - expected).max(-1) / np.abs(expected).max()
  is_selective = config.moe or config.memory
  assert np.quantile(error, 0.5 if is_selective else 1) < 0.06


def test_what_others_read_keeps_its_gain(monkeypatch):
  """A kind of attention or a layer that is not known here."""
  params = copied(make_params(BASE)['params'])
  others = property(lambda config: dict(own=None))
  monkeypatch.setattr(ModelConfig, 'beside_mlp', others)
  params['block_00']['attention']['own'] = dict(gate=np.ones(3))
  params['block_01']['own'] = dict(gate=np.ones(3))
  folded = fold_for_decode(BASE, params)
  first, second = (folded[name] for name in ('block_00', 'block_01'))
  assert first['attention_norm']['scale'] is not None
  assert first['mlp_norm']['scale'] is None
  assert second['attention_norm']['scale'] is None
  assert second['mlp_norm']['scale'] is not None
  assert 'heads' in first['attention']
  assert 'gate_up' in second['mlp']


def num_bytes(params):
  return sum(x.nbytes for x in jax.tree.leaves(params))


def test_no_copy_of_the_model_stays():
  config = KINDS['dense']
  params = jax.tree.map(jnp.array, make_params(config)['params'])
  before = num_bytes(params)
  leaves = [weakref.ref(x) for x in jax.tree.leaves(params)]
  folded = fold_for_decode(config, params)
  gains = 2 * config.num_layers * config.model_dim * 4
  assert num_bytes(folded) == before - gains
  gc.collect()
  alive = [x() for x in leaves if x() is not None]
  # Embedding and last norm, and of each block what writes.
  assert len(alive) == 2 + 2 * config.num_layers


@pytest.mark.parametrize('kind', few(['int8'], ['int8', 'nf4']))
def test_quantized_matrices_stay_as_they_are(kind):
  config = KINDS['gelu']
  how = Quantization(weights=kind)
  params = jax.tree.map(jnp.asarray, make_params(config)['params'])
  params = quantize(config, params, how)
  expected = forward(config, params, tokens())
  folded = fold_for_decode(config, copied(params))
  before, after = (
    tree['block_00']['attention']['query'] for tree in (params, folded)
  )
  assert after.codes is before.codes
  got = decoded(config, folded, tokens())
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_what_has_an_adapter_stays_and_the_rest_is_folded():
  config = KINDS['gelu']
  params = copied(make_params(config)['params'])
  attention = params['block_00']['attention']
  rng = np.random.default_rng(0)
  a = rng.normal(size=(config.model_dim, 2)).astype(np.float32)
  b = rng.normal(size=(2, *attention['query'].shape[1:])).astype(np.float32)
  attention['query'] = AdaptedMatrix(attention['query'], a, b)
  expected = forward(config, params, tokens())
  folded = fold_for_decode(config, copied(params))
  block = folded['block_00']
  assert block['attention_norm']['scale'] is not None
  assert block['mlp_norm']['scale'] is None
  got = decoded(config, folded, tokens())
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
