# SPDX-License-Identifier: Apache-2.0
"""A history of bounded size, beside one that is kept as a plain list."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.ops.attention.rope import rotate
from jaxsparse.ops.sparse_attention.bounded_history import (
  bounded_attention,
  init_bounded_cache,
)
from jaxsparse.ops.sparse_attention.sparse_cache import (
  cached_sparse_attention,
  init_sparse_cache,
)
from jaxsparse.ops.sparse_attention.sparse_inputs import (
  SparseInputs,
  SparseOptions,
)

B, N, K, H = 2, 4, 2, 8
OPTIONS = SparseOptions(block=4, tile=2, window_blocks=1, max_blocks=3, sinks=1)
# All that is eligible may be kept.
WIDE = dataclasses.replace(OPTIONS, max_blocks=16)
HISTORY = 3
ROWS = (OPTIONS.sinks + HISTORY + OPTIONS.window_blocks + 1) * OPTIONS.block


@pytest.fixture(autouse=True)
def double_precision():
  with jax.enable_x64(True):
    yield


def make_inputs(length, coverage=0.7):
  rng = np.random.default_rng(length)
  heads = [rng.normal(size=(B, length, n, H)) for n in (N, K, K)]
  gates = rng.uniform(0.5, 1.5, (B, length, N, 3))
  segments = np.ones((B, length), np.int32)
  shares = np.full((B, length, K), coverage)
  return SparseInputs(*heads, segments, shares, gates)


step = jax.jit(bounded_attention, static_argnames=('options', 'rotate'))
init = jax.jit(init_bounded_cache, static_argnums=range(6))


def in_parts(inputs, lengths, options, history, rotate=rotate):
  cache = init(B, K, H, options, history, jnp.float64)
  outputs, begin = [], 0
  for length in lengths:
    part = jax.tree.map(lambda x, b=begin, e=begin + length: x[:, b:e], inputs)
    y, cache, _ = step(
      part, cache, np.int32(begin), options=options, rotate=rotate
    )
    outputs.append(y)
    begin += length
  assert begin == inputs.query.shape[1]
  return np.concatenate(outputs, axis=1), cache


def unrotated(x, rows):
  return x


def test_with_room_for_all_it_is_the_unbounded_cache():
  inputs = make_inputs(31)

  @jax.jit
  def unbounded(inputs):
    cache = init_sparse_cache(B, K, 40, H, OPTIONS, jnp.float64)
    return cached_sparse_attention(inputs, cache, jnp.int32(0), OPTIONS)

  expected, _, _ = unbounded(inputs)
  y, _ = in_parts(inputs, (31,), OPTIONS, history=6, rotate=unrotated)
  np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
  'lengths',
  [
    (35, *[1] * 5, 35),
    pytest.param((1,) * 75, marks=pytest.mark.slow),
  ],
  ids=['mixed', 'ones'],
)
def test_parts_change_nothing(lengths):
  inputs = make_inputs(75)
  assert inputs.query.shape[1] > 3 * ROWS
  expected, cache = in_parts(inputs, (75,), OPTIONS, HISTORY)
  y, other = in_parts(inputs, lengths, OPTIONS, HISTORY)
  np.testing.assert_allclose(y, expected, rtol=0, atol=1e-14)
  np.testing.assert_allclose(cache.worth, other.worth, rtol=0, atol=1e-14)
  np.testing.assert_array_equal(cache.seen, other.seen)


def oracle(inputs, row, grid, history):
  """One sequence, a list of blocks and dense attention to all of them."""
  q, k, v, _, _, gates = (np.asarray(x[row]) for x in inputs[:6])
  blocks, outputs = [], []
  capacity = grid.sinks + history + grid.window_blocks + 1

  def turned(x, place):
    frequency = 1e4 ** (-np.arange(H // 2) / (H // 2))
    turn = np.exp(1j * np.asarray(place)[..., None] * frequency)
    z = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * turn
    return np.concatenate([z.real, z.imag], axis=-1)

  def mean_key(block, place):
    offsets = np.arange(len(block['rows']))[:, None]
    mean = turned(k[block['rows']], offsets).mean(0)
    return turned(mean, np.full(len(mean), place * grid.block))

  for t in range(len(q)):
    if t % grid.block == 0:
      if len(blocks) == capacity:
        old = blocks[grid.sinks : capacity - grid.window_blocks - 1]
        block = min(old, key=lambda b: b['worth'] / (1 - 0.9 ** b['seen']))
        blocks = [b for b in blocks if b is not block]
      blocks.append(dict(rows=[], worth=0.0, seen=0))
    blocks[-1]['rows'].append(t)
    place = (len(blocks) - 1) * grid.block + t % grid.block
    query = turned(q[t], np.full(N, place)) / np.sqrt(H)
    group = N // K
    eligible = blocks[: -1 - grid.window_blocks]
    if t % grid.tile == 0 and eligible:
      keys = np.stack([mean_key(b, j) for j, b in enumerate(eligible)])
      scores = np.stack([keys[:, n // group] @ query[n] for n in range(N)])
      shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
      for block, share in zip(eligible, shares.mean(0), strict=True):
        block['worth'] = 0.9 * block['worth'] + 0.1 * share
        block['seen'] += 1
    y = np.zeros((N, H))
    for n in range(N):
      parts = []
      for j, block in enumerate(blocks):
        rows = np.array(block['rows'])
        places = j * grid.block + rows % grid.block
        logits = turned(k[rows, n // group], places) @ query[n]
        gate = gates[t, n, 1 if j < len(eligible) else 0]
        parts.append((gate * np.exp(logits), v[rows, n // group]))
      total = sum(np.sum(w) for w, _ in parts)
      y[n] = sum(np.asarray(w) @ values for w, values in parts) / total
    outputs.append(y)
  return np.stack(outputs)


def test_it_is_a_list_of_blocks():
  inputs = make_inputs(70, coverage=np.inf)
  y, _ = in_parts(inputs, (70,), WIDE, HISTORY)
  for row in range(B):
    expected = oracle(inputs, row, WIDE, HISTORY)
    np.testing.assert_allclose(y[row], expected, rtol=0, atol=2e-5)


def test_what_is_read_stays():
  """A block that every tile wants is kept, and the sinks are."""
  length = 80
  q, k, v, *rest = make_inputs(length)
  wanted = 2 * WIDE.block
  k = 0.01 * k
  k[:, wanted : wanted + WIDE.block] = 1.0
  q = np.ones_like(q)
  v = np.broadcast_to(np.arange(length, dtype=float)[:, None, None], v.shape)
  _, cache = in_parts(
    SparseInputs(q, k, v, *rest), (length,), WIDE, HISTORY, rotate=unrotated
  )
  rows = np.unique(np.asarray(cache.pages.value)[..., 0])
  assert set(range(wanted, wanted + 4)) <= set(rows)
  assert set(range(4)) <= set(rows)
  assert len(rows) == ROWS


def test_another_document_is_forgotten_first():
  """Blocks that no tile may read are worth nothing."""
  inputs = make_inputs(80)
  inputs.segments[:, 24:] = 2
  y, cache = in_parts(inputs, (80,), WIDE, HISTORY, rotate=unrotated)
  assert np.isfinite(y).all()
  kept = np.asarray(cache.pages.segments).reshape(B, -1, WIDE.block)[:, 1:]
  assert (kept == 2).all()
