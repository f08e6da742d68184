# SPDX-License-Identifier: Apache-2.0
"""Decoding with keys and values of 8 bits, in every kind of cache."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from slot_models import MODELS, V, make_params

from jaxsparse import mesh
from jaxsparse.analysis import cost
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import UserError
from jaxsparse.inference import room
from jaxsparse.nn.attention import layer, sparse
from jaxsparse.nn.transformer import Transformer, init_cache

B, LENGTH, PROMPT = 2, 22, 10

jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)


def quantized(name):
  return dataclasses.replace(MODELS[name], kv_cache='int8')


def rounded(x):
  """The numbers that 8 bits keep of each row."""
  scale = jnp.abs(x).max(-1, keepdims=True) / 127
  return jnp.where(scale > 0, jnp.round(x / scale), 0) * scale


def inputs():
  tokens = np.random.default_rng(4).integers(0, V, (B, LENGTH), np.int32)
  at = np.tile(np.arange(LENGTH, dtype=np.int32), (B, 1))
  return tokens, at, np.ones_like(at)


def decoded(config, parts):
  """Logits of all tokens, which come in parts, and the cache."""
  cache, logits, begin = init_cache(config, B, LENGTH), [], 0
  apply = jit(lambda *args: Transformer(config).apply(*args)[:2])
  for length in parts:
    part = [x[:, begin : begin + length] for x in inputs()]
    y, cache = apply(make_params(MODELS[name_of(config)]), *part, cache)
    logits.append(np.asarray(y))
    begin += length
  return np.concatenate(logits, 1), cache


def name_of(config):
  exact = dataclasses.replace(config, kv_cache='exact')
  return next(name for name, model in MODELS.items() if model == exact)


def by_rounded_rows(name, monkeypatch):
  """Logits by exact keys and values that were rounded before."""
  config, attend = MODELS[name], layer.attention

  def dense(query, key, value, *args, **kwargs):
    return attend(query, rounded(key), rounded(value), *args, **kwargs)

  def of_inputs(function):
    def run(inputs, *args, **kwargs):
      inputs = inputs._replace(
        key=rounded(inputs.key), value=rounded(inputs.value)
      )
      return function(inputs, *args, **kwargs)

    return run

  with monkeypatch.context() as patch:
    patch.setattr(layer, 'attention', dense)
    for op in ('sparse_attention', 'bounded_attention'):
      patch.setattr(sparse, op, of_inputs(getattr(sparse, op)))
    if config.sparse and config.sparse.history_blocks:
      # It has no forward pass without a cache. Rings round what is rounded.
      return decoded(config, (LENGTH,))[0]
    return np.asarray(
      jit(lambda *args: Transformer(config).apply(*args)[0])(
        make_params(config), *inputs()
      )
    )


@pytest.mark.parametrize(
  'name',
  few(['dcmha'], ['dense', 'dcmha', 'sparse', 'indexed', 'bounded']),
)
def test_decoding_reads_rounded_keys_and_values(name, monkeypatch):
  """Rings go around seven times, histories forget, heads are composed."""
  logits, cache = decoded(quantized(name), (PROMPT, *[1] * (LENGTH - PROMPT)))
  wanted = by_rounded_rows(name, monkeypatch)
  difference = np.abs(logits - wanted).max(-1)
  # What differs in its last bits may be rounded to another code.
  assert np.median(difference) < 1e-5
  assert difference.max() < 0.02
  codes = [x for x in jax.tree.leaves(cache) if x.dtype == jnp.int8]
  assert len(codes) == 2 * MODELS[name].num_layers
  assert all(np.abs(x).max() == 127 for x in codes)


@pytest.mark.slow
def test_devices_decode_as_one(monkeypatch):
  config = quantized('dcmha')
  expected = decoded(config, (PROMPT, 1, 1))[0]
  with jax.set_mesh(mesh.make_mesh(2, 1, 2, devices=jax.devices()[:4])):
    found = decoded(config, (PROMPT, 1, 1))[0]
  np.testing.assert_allclose(found, expected, atol=0.02)
  assert np.median(np.abs(found - expected)) < 1e-5


def num_bytes(config, batch_size, length):
  cache = jax.eval_shape(lambda: init_cache(config, batch_size, length))
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache)
  )


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_bytes_of_a_cache(dtype):
  config = ModelConfig(
    num_layers=3,
    num_kv_heads=2,
    head_dim=64,
    attention_pattern=('global', 'local', 'global'),
    window=16,
    dtype=dtype,
  )
  size = jnp.dtype(dtype).itemsize
  # Keys and values of all heads, then positions and documents.
  rows, shared = 2 * 100 + 16, 8 * (100 + 16)
  exact = 3 * (rows * 2 * 2 * 64 * size + shared) + 4
  assert num_bytes(config, 3, 100) == exact
  small = dataclasses.replace(config, kv_cache='int8')
  quantized = 3 * (rows * 2 * 2 * (64 + 4) + shared) + 4
  assert num_bytes(small, 3, 100) == quantized
  # What memory is asked for before a cache is made, one token less.
  cache = room._abstract_cache(small, 3, 101)
  assert room._bytes(cache) == quantized
  read = cost.decode_bytes(small, 3, 100, bytes_per_value=size).cache
  assert read == 3 * rows * 2 * 2 * (64 + 4)
  exactly = cost.decode_bytes(config, 3, 100, bytes_per_value=size).cache
  assert read / exactly == (64 + 4) / (64 * size)


@pytest.mark.parametrize('name', ['indexed', 'bounded'])
def test_bytes_of_a_sparse_cache(name):
  """Summaries and keys of a router stay as they are."""
  exact, small = (
    num_bytes(MODELS[name], 2, 20),
    num_bytes(quantized(name), 2, 20),
  )
  rows = 20 if name == 'indexed' else 10
  # Of the sparse layer, and of the other one's ring; width 4, two heads.
  saved = 2 * (rows + 3) * 2 * 2 * (4 * 4 - (4 + 4))
  assert exact - small == saved


def test_it_is_a_word():
  with pytest.raises(UserError, match='kv_cache must be one of exact, int8'):
    ModelConfig(kv_cache='int4')
