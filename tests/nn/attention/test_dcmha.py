# SPDX-License-Identifier: Apache-2.0
"""The parameters of composed heads, and models that have them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import Payload, payloads
from lanes import few
from parameters import draw

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.config.attention import DCMHAConfig, query_wise_dcmha
from jaxsparse.nn.attention.dcmha import DCMHA
from jaxsparse.nn.attention.layer import Attention
from jaxsparse.nn.transformer import Transformer, init_cache

# The programs run once: compiling them well would take most of the time.
jit = functools.partial(
  jax.jit, compiler_options={'xla_llvm_disable_expensive_passes': True}
)

KEY = jax.random.key(0)
B, T, D = 2, 6, 12
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
POSITIONS = np.tile(np.arange(T, dtype=np.int32), (B, 1))
INPUTS = tuple(map(jnp.asarray, (X, POSITIONS, np.ones_like(POSITIONS))))


def make_config(**fields):
  sizes = dict(model_dim=D, num_heads=4, num_kv_heads=4, head_dim=4)
  return ModelConfig(**(sizes | fields))


@pytest.mark.parametrize(
  ('model_dim', 'num_heads', 'hidden', 'low_rank', 'gate'),
  few(
    [(1024, 16, 4.29e-2, 1.39e-4, 2.19e-4)],
    [
      (1024, 16, 4.29e-2, 1.39e-4, 2.19e-4),
      (2560, 32, 2.73e-2, 5.20e-5, 1.39e-4),
      (4096, 32, 2.18e-2, 5.20e-5, 1.10e-4),
    ],
  ),
)
def test_deviations_at_the_start(model_dim, num_heads, hidden, low_rank, gate):
  """Of the official code, to three digits and the error of the sample."""
  module = DCMHA(DCMHAConfig(base=True), num_heads)
  x = np.zeros((1, 1, model_dim), np.float32)
  params = jit(module.init)(KEY, x)['params']
  expected = dict(hidden=hidden, low_rank=low_rank, gate=gate)
  expected |= dict.fromkeys(['pre_base', 'post_base'], 0.1 * num_heads**-0.5)
  assert params.keys() == expected.keys()
  for name, deviation in expected.items():
    found = np.sqrt(np.square(params[name]).mean(dtype=np.float64))
    tolerance = 0.005 + 3 * (2 * params[name].size) ** -0.5
    assert found == pytest.approx(deviation, rel=tolerance), name


def test_all_parameters_learn_from_the_default_start():
  module = Attention(make_config(dcmha=DCMHAConfig(base=True)))

  def loss(params):
    y, _, _ = module.apply(params, *INPUTS)
    return jnp.sin(y).sum()

  gradients = jit(lambda *args: jax.grad(loss)(module.init(*args)))
  found = gradients(KEY, *INPUTS)['params']['dcmha']
  reads, writes = np.split(np.asarray(found.pop('low_rank')), 2, axis=3)
  assert len(found) == 4
  for gradient in (reads, writes, *found.values()):
    assert np.abs(gradient).min() > 0


def test_query_wise_caches_what_plain_attention_does():
  fields = dict(attention_pattern=('global', 'local'), window=3, num_layers=2)
  config = make_config(dcmha=query_wise_dcmha(base=True), **fields)
  caches = [
    jax.eval_shape(functools.partial(init_cache, c, B, T))
    for c in (config, make_config(**fields))
  ]
  assert caches[0] == caches[1]


def test_bfloat16_with_a_cache_is_as_without():
  """Up to its own distance from float32, with a prompt beyond the window."""
  length, vocab_size = 10, 23
  config = make_config(
    num_layers=2, mlp_dim=24, vocab_size=vocab_size,
    attention_pattern=('local', 'global'), window=4,
    dcmha=DCMHAConfig(base=True),
  )  # fmt: skip
  narrow = dataclasses.replace(config, dtype='bfloat16')
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, vocab_size, (B, length), np.int32)
  positions = np.tile(np.arange(length, dtype=np.int32), (B, 1))
  inputs = (tokens, positions, np.ones_like(tokens))

  params = draw(Transformer(config).init, *inputs)
  apply = {
    c.dtype: jit(lambda *args, c=c: Transformer(c).apply(*args)[:2])
    for c in (config, narrow)
  }
  expected, full = (
    np.asarray(apply[n](params, *inputs, None)[0]) for n in apply
  )
  cache = jit(functools.partial(init_cache, narrow, B, length))()
  outputs, begin = [], 0
  for num_new in (6, 1, 1, 1, 1):
    part = [x[:, begin : begin + num_new] for x in inputs]
    y, cache = apply['bfloat16'](params, *part, cache)
    outputs.append(y)
    begin += num_new
  cached = np.concatenate(outputs, axis=1)

  noise, difference = (
    np.sqrt(np.square(x).mean((0, 2))) for x in (full - expected, cached - full)
  )
  assert noise.mean() < 0.05 * expected.std()
  assert difference.max() < 0.05 * noise.max()


def test_groups_of_heads_are_split_over_model():
  """What crosses the mesh more than without is the generator, over `data`."""

  def sent(config):
    module = Attention(config)
    init = functools.partial(module.init, KEY, *INPUTS)
    params = mesh.abstract(init, mesh=jax.sharding.get_mesh())
    program = jax.jit(module.apply).lower(params, *INPUTS).compile()
    return payloads(program.as_text()), params['params'].get('dcmha')

  fields = dict(num_heads=8, num_kv_heads=8)
  composed = make_config(**fields, dcmha=DCMHAConfig(base=True, num_groups=4))
  with jax.set_mesh(mesh.make_mesh(2, 1, 4)):
    plain, _ = sent(make_config(**fields))
    found, generator = sent(composed)
  gathered = [
    Payload('all-gather', 'f32', generator[name].size)
    for name in ('hidden', 'gate')
  ]
  assert found == sorted(plain + gathered)
