# SPDX-License-Identifier: Apache-2.0
"""The attention module: its formula, its cache, its normalisation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from parameters import draw, place

from jaxsparse import mesh
from jaxsparse.analysis import attention_cost
from jaxsparse.config import ModelConfig
from jaxsparse.config.attention import (
  DCMHAConfig,
  RopeScalingConfig,
  SparseAttentionConfig,
  query_wise_dcmha,
)
from jaxsparse.nn.attention import cache as attention_cache
from jaxsparse.nn.attention.dcmha import DCMHA
from jaxsparse.nn.attention.layer import Attention

KEY = jax.random.key(0)
B, T, D = 2, 6, 12


def one_document(length, batch=B):
  """x, positions and segments."""
  x = np.random.default_rng(0).normal(size=(batch, length, D))
  positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
  return x.astype(np.float32), positions, np.ones_like(positions)


X, POSITIONS, SEGMENTS = one_document(T)


def make_config(**fields):
  sizes = dict(model_dim=D, num_heads=4, num_kv_heads=2, head_dim=4)
  return ModelConfig(**(sizes | fields))


LLAMA3 = RopeScalingConfig(original_length=32)

SPARSE = SparseAttentionConfig(
  block=2, tile=2, window_blocks=1, max_blocks=2, coverage_logit=0.5
)

INDEXER = dataclasses.replace(
  SPARSE, router='indexer', router_heads=3, router_dim=4
)
NSA = dataclasses.replace(SPARSE, combine='gated')
# Neither bound alone tells how many blocks are kept.
FRACTION = dataclasses.replace(
  SPARSE, window_blocks=0, max_blocks=4, min_fraction=0.3, max_fraction=0.6
)
LOCAL_OF_3 = dict(attention_pattern=('local',), window=3)


def sparse_layer(sparse, **fields):
  sparse = dataclasses.replace(sparse, **fields)
  return dict(attention_pattern=('sparse',), sparse=sparse)


# Global and local, with and without composition of heads, and sparse.
VARIANTS = dict(
  plain=dict(qk_norm='head'),
  published=dict(qk_norm='projection', bias='qkv', rope_scaling=LLAMA3),
  local=LOCAL_OF_3,
  dcmha=dict(dcmha=DCMHAConfig(base=True)),
  dcmha_in_groups=dict(dcmha=DCMHAConfig(num_groups=2, rank=1)),
  local_dcmha=LOCAL_OF_3 | dict(dcmha=DCMHAConfig()),
  local_query_wise=LOCAL_OF_3 | dict(dcmha=query_wise_dcmha()),
  chunks=dict(query_chunk=2),
  local_chunks=LOCAL_OF_3 | dict(query_chunk=2),
  dcmha_chunks=dict(query_chunk=2, dcmha=DCMHAConfig(base=True)),
  local_dcmha_chunks=LOCAL_OF_3 | dict(query_chunk=2, dcmha=DCMHAConfig()),
  sparse=sparse_layer(SPARSE),
  bounded=sparse_layer(SPARSE, history_blocks=4),
  indexer=sparse_layer(INDEXER),
  nsa=sparse_layer(NSA),
  no_summaries=sparse_layer(SPARSE, use_summaries=False),
  fraction=sparse_layer(FRACTION),
)
RARE_VARIANTS = dict(
  # Which rotates keys when it reads them.
  bounded_indexer=sparse_layer(INDEXER, history_blocks=4)
  | dict(qk_norm='projection', rope_scaling=LLAMA3),
  indexer_no_summaries=sparse_layer(INDEXER, use_summaries=False),
  bounded_no_summaries=sparse_layer(
    SPARSE, use_summaries=False, history_blocks=4
  ),
  nsa_no_summaries=sparse_layer(NSA, use_summaries=False),
  bounded_nsa=sparse_layer(NSA, history_blocks=4),
  bounded_fraction=sparse_layer(FRACTION, history_blocks=4),
)


def draw_and_run(config, *inputs):
  """Parameters of a size at which composition matters, and the output."""
  module = Attention(config)
  params = draw(module.init, *inputs)
  y, _, _ = jax.jit(module.apply)(params, *inputs)
  return module, params, np.asarray(y)


def run_in_parts(module, params, lengths, *inputs, capacity=None):
  """Through a cache, so many positions at a time."""
  batch, total = inputs[1].shape
  capacity = capacity or total

  @jax.jit
  def empty():
    rows = attention_cache.init_rows(module.config, 0, batch, capacity)
    return rows | attention_cache.init_shared(module.config, batch, capacity)

  cache = empty()
  apply, outputs, begin = jax.jit(module.apply), [], 0
  for length in lengths:
    part = [x[:, begin : begin + length] for x in inputs]
    y, cache, _ = apply(params, *part, cache)
    outputs.append(y)
    begin += length
  assert begin == total == cache['index']
  return np.concatenate(outputs, axis=1), cache


@pytest.mark.parametrize(
  'lengths',
  # Of two lengths only, each of which is a program.
  [(4, 1, 1, 4, 1)]
  + [
    pytest.param(lengths, marks=pytest.mark.slow)
    for lengths in ((11,), (1,) * 11, (2, 6, 3))
  ],
  ids=str,
)
@pytest.mark.parametrize(
  'variant',
  few(
    [
      'published', 'dcmha_in_groups', 'local_dcmha_chunks', 'nsa',
      'bounded_indexer',
    ],
    [*VARIANTS, *RARE_VARIANTS],
  ),
)  # fmt: skip
def test_a_cache_gives_the_same_at_every_position(variant, lengths):
  """Two documents, and padding on the left of one row.

  For sparse attention without a bound that row is on the grid of blocks as it
  is without the padding.
  """
  length = sum(lengths)
  x, _, _ = one_document(length)
  segments = np.array([[1] * 4 + [2] * 7, [0] * 2 + [1] * 9], np.int32)
  positions = np.array([[*range(4), *range(7)], [0, 0, *range(9)]], np.int32)
  inputs = (x, positions, segments)
  config = make_config(**(VARIANTS | RARE_VARIANTS)[variant])
  on_grid = config.sparse and not config.sparse.history_blocks
  padding = 2 if on_grid else 0

  def moved(x, by):
    return np.stack([x[0], np.roll(x[1], by, axis=0)])

  module, params, expected = draw_and_run(
    config, *(moved(x, -padding) for x in inputs)
  )
  y, _ = run_in_parts(module, params, lengths, *inputs, capacity=length + 2)
  is_token = segments[..., None] > 0
  np.testing.assert_allclose(
    y * is_token, moved(expected, padding) * is_token, rtol=2e-6, atol=2e-6
  )


def test_a_local_layer_keeps_a_window_and_no_more():
  config = make_config(**VARIANTS['local_dcmha'])
  inputs = (X, POSITIONS, SEGMENTS)
  module, params, _ = draw_and_run(config, *inputs)
  _, cache = run_in_parts(module, params, (4, 2), *inputs)
  shapes = {name: x.shape for name, x in cache.items()}
  assert shapes == dict(
    index=(),
    ring_places=(B, 2, 3),
    key=(B, 2, 3, 4),
    value=(B, 2, 3, 4),
    factors=(B, 2, 5, 4, 3),
  )
  # Row i in entry i mod 3.
  np.testing.assert_array_equal(cache['ring_places'][0, 0], [3, 4, 5])


def test_factors_of_queries_are_not_cached():
  config = make_config(dcmha=query_wise_dcmha(base=True))
  assert attention_cache.init_rows(config, 0, 1, 8).keys() == {'key', 'value'}


@pytest.mark.parametrize('variant', ['plain', 'local', 'local_dcmha'])
def test_chunks_of_queries_give_the_same(variant):
  fields = make_config(**VARIANTS[variant])
  chunked = make_config(**VARIANTS[variant], query_chunk=4)
  inputs = one_document(11)
  _, params, expected = draw_and_run(fields, *inputs)
  y, _, _ = jax.jit(Attention(chunked).apply)(params, *inputs)
  np.testing.assert_allclose(y, expected, atol=2e-6)


def test_default_start_is_near_plain_attention():
  inputs = (X, POSITIONS, SEGMENTS)
  config = make_config(dcmha=DCMHAConfig())
  params = jax.jit(Attention(config).init)(KEY, *inputs)['params']
  plain = {name: x for name, x in params.items() if name != 'dcmha'}
  near, expected = (
    np.asarray(jax.jit(Attention(c).apply)({'params': p}, *inputs)[0])
    for c, p in ((config, params), (make_config(), plain))
  )
  error = np.linalg.norm(near - expected) / np.linalg.norm(expected)
  assert 1e-5 < error < 0.02


@pytest.mark.parametrize(
  ('model_dim', 'num_heads', 'options', 'count'),
  [
    (1024, 16, {}, 344_064),
    (1024, 16, dict(base=True), 344_064 + 512),
    (2560, 32, {}, 1_703_936),
    (5120, 40, {}, 4_198_400),
    (6656, 52, {}, 7_095_296),
    (1024, 16, dict(key_wise=False), 344_064 // 2),
    (64, 8, dict(num_groups=2), 20 * 64 * 8 + 64 * 8**2 // 2),
  ],
)
def test_number_of_parameters(model_dim, num_heads, options, count):
  """Section 7 of the published cost formulas."""
  module = DCMHA(DCMHAConfig(**options), num_heads)
  x = jax.ShapeDtypeStruct((1, 1, model_dim), jnp.float32)
  leaves = jax.tree.leaves(jax.eval_shape(module.init, KEY, x))
  assert sum(leaf.size for leaf in leaves) == count


MODEL_OF_4 = (2, 1, 4)
LOCAL = dict(attention_pattern=('local',), window=3, query_chunk=4)


@pytest.mark.parametrize(
  ('sizes', 'fields'),
  [
    # An axis of length 1 must not go to heads that meet.
    pytest.param(
      (1, 1, 1), LOCAL | dict(dcmha=DCMHAConfig()), marks=pytest.mark.slow
    ),
    pytest.param(
      MODEL_OF_4,
      LOCAL | dict(num_heads=8, dcmha=DCMHAConfig(base=True)),
      marks=pytest.mark.slow,
    ),
    # Groups are split over `model` where it divides them; by factors, for there
    # are fewer queries than heads, and by matrices.
    (
      MODEL_OF_4,
      LOCAL | dict(num_heads=8, dcmha=DCMHAConfig(base=True, num_groups=4)),
    ),
    pytest.param(
      MODEL_OF_4,
      LOCAL | dict(dcmha=DCMHAConfig(base=True, num_groups=4)),
      marks=pytest.mark.slow,
    ),
    # In the default lane on the mesh of a guest, and traced on a pod.
    pytest.param(
      MODEL_OF_4,
      dict(num_heads=8, attention_pattern=('sparse',), sparse=SPARSE),
      marks=pytest.mark.slow,
    ),
    # A norm over heads of all devices.
    (
      MODEL_OF_4,
      dict(num_heads=8, qk_norm='projection', bias='qkv', rope_scaling=LLAMA3),
    ),
    pytest.param(
      MODEL_OF_4,
      dict(num_heads=8, attention_pattern=('sparse',), sparse=INDEXER),
      marks=pytest.mark.slow,
    ),
  ],
  ids=[
    'one device',
    'dcmha',
    'by factors',
    'by matrices',
    'sparse',
    'published',
    'indexer',
  ],
)
def test_any_mesh_gives_the_same(sizes, fields):
  config = make_config(num_kv_heads=4, **fields)
  inputs = one_document(T, batch=4 * B)
  module = Attention(config)

  params = draw(module.init, *inputs, deviation=0.2)

  @jax.jit
  def run(params, *inputs):
    def loss(params):
      y, _, metrics = module.apply(params, *inputs)
      return jnp.sin(y).sum(), (y, metrics)

    return jax.grad(loss, has_aux=True)(params)

  expected = run(params, *inputs)
  with jax.set_mesh(
    mesh.make_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
  ):
    sharded = run(place(params, module.init, *inputs), *inputs)
  # Some gradients of the generator are as large as 70.
  for got, want in zip(*map(jax.tree.leaves, (sharded, expected)), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


def test_an_indexer_learns_alone():
  """Its loss trains it and nothing else, and nothing else trains it."""
  config = make_config(
    attention_pattern=('sparse',),
    sparse=INDEXER,
  )
  module, inputs = Attention(config), one_document(24)

  @jax.jit
  def slopes(params, *inputs):
    def run(params):
      y, _, metrics = module.apply(params, *inputs)
      return jnp.stack([jnp.sin(y).sum(), metrics['aux_loss']]), metrics

    return jax.jacobian(run, has_aux=True)(params)

  jacobian, metrics = slopes(draw(module.init, *inputs), *inputs)
  assert metrics['aux_loss'] == metrics['router_loss'] > 0
  leaves = jax.tree_util.tree_leaves_with_path(jacobian['params'])
  names = [jax.tree_util.keystr(path) for path, _ in leaves]
  assert sum('router' in name for name in names) == 3
  for name, (_, slope) in zip(names, leaves, strict=True):
    of_output, of_loss = np.abs(slope).reshape(2, -1).max(1)
    if 'router' in name:
      assert (of_output, of_loss > 0) == (0, True), name
    else:
      assert (of_output > 0, of_loss) == (True, 0), name


@pytest.mark.parametrize('sparse', [SPARSE, INDEXER])
def test_cost_counts_what_a_sparse_layer_has(sparse):
  config = make_config(attention_pattern=('sparse',), sparse=sparse)
  shapes = jax.eval_shape(Attention(config).init, KEY, X, POSITIONS, SEGMENTS)
  count = sum(x.size for x in jax.tree.leaves(shapes))
  gains = attention_cost.attention_gains(config, 0)
  assert count == attention_cost.attention_parameters(config, 0) + gains
