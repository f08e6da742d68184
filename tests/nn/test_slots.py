# SPDX-License-Identifier: Apache-2.0
"""Slots that move by themselves against the same sequences offline."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import draw

from jaxsparse.config import (
  DCMHAConfig,
  MemoryConfig,
  ModelConfig,
  MoEConfig,
  SparseAttentionConfig,
)
from jaxsparse.inference import slots
from jaxsparse.nn.transformer import Transformer, init_cache
from jaxsparse.ops.sparse_attention.bounded_slots import needs_room

jit = functools.partial(
  jax.jit,
  compiler_options={
    'xla_backend_optimization_level': 0,
    'xla_llvm_disable_expensive_passes': True,
  },
)

V, C = 23, 4
PROMPTS = (1, C - 1, C, C + 1, 3 * C + 5)
B, LENGTH = len(PROMPTS), 3 * C + 5 + 4

BASE = ModelConfig(
  num_layers=2,
  model_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=24,
  vocab_size=V,
)
SMALL = dict(num_keys=8, key_dim=4, num_selected=4)


def with_memory(memory, **fields):
  return dataclasses.replace(BASE, memory=memory, **fields)


def sparse(pattern, **fields):
  config = SparseAttentionConfig(
    block=2, tile=2, window_blocks=1, max_blocks=2, coverage_logit=0.5
  )
  config = dataclasses.replace(config, **fields)
  return dataclasses.replace(
    BASE, attention_pattern=pattern, window=3, sparse=config
  )


MODELS = dict(
  dense=BASE,
  moe=dataclasses.replace(
    BASE, moe=MoEConfig(num_experts=16, expert_dim=12, num_shared=1)
  ),
  few_experts=dataclasses.replace(
    BASE, moe=MoEConfig(num_experts=4, expert_dim=12)
  ),
  pkm=with_memory(
    MemoryConfig.pkm(**SMALL, num_heads=2, value_dim=16, placements=((1, 1),))
  ),
  peer=with_memory(
    MemoryConfig.peer(
      **SMALL, num_heads=2, value_dim=16, pre_value_dim=16,
      placements=((0, 0),),
    )
  ),
  memory_plus=with_memory(
    MemoryConfig.memory_plus(
      **SMALL, num_heads=2, value_dim=16, shared_rows=64,
      placements=((1, 1),),
    )
  ),
  ultramem=with_memory(
    MemoryConfig(**SMALL, value_dim=8, placements=((0, 1),))
  ),
  convolved=with_memory(
    MemoryConfig(
      **SMALL, value_dim=8, query_conv_taps=5, placements=((0, 1), (1, 1))
    )
  ),
  v2=with_memory(
    MemoryConfig.ultramem_v2(
      **SMALL, value_dim=8, pre_value_dim=4, shared_rows=100,
      placements=((0, 0), (1, 1)),
    )
  ),
  dcmha=dataclasses.replace(
    BASE, attention_pattern=('local', 'global'), window=3,
    dcmha=DCMHAConfig(base=True), query_chunk=2,
  ),
  sparse=sparse(('sparse', 'local')),
  indexed=sparse(('local', 'sparse'), router='indexer', tile=1),
  bounded=sparse(('sparse', 'local'), history_blocks=2),
)  # fmt: skip


@functools.cache
def make_params(config):
  one = np.ones((1, 2), np.int32)
  return draw(Transformer(config).init, one, one, one)


def sequences():
  return np.random.default_rng(3).integers(0, V, (B, LENGTH), np.int32)


def places(begin, length):
  """Positions from `begin` of each sequence on [B, length]."""
  return (np.asarray(begin)[:, None] + np.arange(length)).astype(np.int32)


@functools.cache
def offline(config):
  """Logits [B, LENGTH, V] by one call with one index."""
  at = places([0] * B, LENGTH)
  apply = jit(
    lambda params, *inputs: Transformer(config).apply(
      params, *inputs, init_cache(config, B, LENGTH)
    )[0]
  )
  return np.asarray(
    apply(make_params(config), sequences(), at, np.ones_like(at))
  )


def programs(config):
  apply = jit(lambda *args: Transformer(config).apply(*args)[:2])

  @jit
  def forget(cache, slot):
    part = slots.forget(config, slots.take(cache, slot))
    return slots.put(cache, part, slot)

  return apply, forget


def fed(config, cache, seed, check):
  """Prompts in chunks and then token by token, in any order; the cache."""
  rng, tokens = np.random.default_rng(seed), sequences()
  apply, forget = programs(config)
  params, done = make_params(config), np.zeros(B, int)
  num_rows, prompts = slots.rows_of_bounded(config), np.array(PROMPTS)
  while (done < LENGTH).any():
    if num_rows:
      for slot in range(B):
        if needs_room(int(done[slot]), num_rows, config.sparse.block):
          cache = forget(cache, np.int32(slot))
    is_reading = done < prompts
    reads = is_reading.any() and rng.random() < 0.5
    may = is_reading if reads else ~is_reading & (done < LENGTH)
    if not may.any():
      continue
    is_live = may & (rng.random(B) < 0.6)
    ends = prompts if reads else done + 1
    length = C if reads else 1
    count = np.where(is_live, np.minimum(ends - done, length), 0)
    at = places(done, length)
    is_token = np.arange(length) < count[:, None]
    # Padding holds anything.
    fed = rng.integers(0, V, (B, length), np.int32)
    rows, columns = np.nonzero(is_token)
    fed[rows, columns] = tokens[rows, at[rows, columns]]
    logits, cache = apply(params, fed, at, is_token.astype(np.int32), cache)
    check(np.asarray(logits)[rows, columns], rows, at[rows, columns])
    done += count
    np.testing.assert_array_equal(cache['shared']['index'], done)
  return cache


def rows_for_chunks(length):
  return -(-length // C) * C


@pytest.mark.parametrize('name', MODELS)
def test_slots_are_their_sequences_alone(name):
  config = MODELS[name]
  expected = offline(config)

  def check(logits, rows, at):
    np.testing.assert_allclose(logits, expected[rows, at], atol=2e-5)

  cache = init_cache(config, B, rows_for_chunks(LENGTH), has_slots=True)
  cache = fed(config, cache, 0, check)
  # New tenants find what the former ones left, or worse.
  cache = jax.tree.map(
    lambda x: jnp.full_like(x, 1e4 if x.dtype == jnp.float32 else 1), cache
  )
  fed(config, slots.emptied(cache), 1, check)
