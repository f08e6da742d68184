# SPDX-License-Identifier: Apache-2.0
"""Slots that move by themselves against the same sequences offline."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from slot_models import MODELS, V, make_params, tolerance

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

C = 4
PROMPTS = (1, C - 1, C, C + 1, 3 * C + 5)
B, LENGTH = len(PROMPTS), 3 * C + 5 + 4


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


@functools.cache
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


@pytest.mark.parametrize('name', few(['bounded'], MODELS))
def test_slots_are_their_sequences_alone(name):
  config = MODELS[name]
  expected = offline(config)

  def check(logits, rows, at):
    atol = tolerance(config, 2e-5)
    np.testing.assert_allclose(logits, expected[rows, at], atol=atol)

  cache = init_cache(config, B, rows_for_chunks(LENGTH), has_slots=True)
  cache = fed(config, cache, 0, check)
  # New tenants find what the former ones left, or worse.
  cache = jax.tree.map(
    lambda x: jnp.full_like(x, 1e4 if x.dtype == jnp.float32 else 1), cache
  )
  fed(config, slots.emptied(cache), 1, check)
