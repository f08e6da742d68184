# SPDX-License-Identifier: Apache-2.0
"""Sparse attention: a prototype's numbers, and dense attention as a case of it.

The fixture is what the prototype made of inputs that are drawn again here: in
'r8' all of it, in the other cases that of the first key/value head.
"""

import ast
import dataclasses
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse.ops.attention.dense import attention
from jaxsparse.ops.sparse_attention.sparse_attention import sparse_attention
from jaxsparse.ops.sparse_attention.sparse_cache import (
  cached_sparse_attention,
  init_sparse_cache,
)
from jaxsparse.ops.sparse_attention.sparse_inputs import (
  SparseInputs,
  SparseOptions,
)

FIXTURE = pathlib.Path(__file__).parents[2] / 'fixtures/sparse_attention.npz'


@pytest.fixture(autouse=True)
def double_precision():
  with jax.enable_x64(True):
    yield


# Each drew from the key of its number.
CASES = ('r8', 'r1', 'nosum')


def draw_inputs(case, sizes, batch, length):
  heads = [sizes[n] for n in ('Hq', 'Hk', 'Hk', 'Hq')]
  shapes = [(batch, length, n, sizes['d']) for n in heads]
  shapes.append((batch, sizes['Hk'], length // sizes['r']))
  keys = jax.random.split(jax.random.key(CASES.index(case)), 5)
  *arrays, cotangent, theta = map(jax.random.normal, keys, shapes)
  return *arrays, jax.nn.sigmoid(theta), cotangent


@pytest.mark.parametrize('case', few(['r8', 'nosum'], CASES))
def test_equals_the_prototype(case):
  with np.load(FIXTURE) as data:
    fixture = {
      name.split('/')[1]: data[name]
      for name in data.files
      if name.startswith(f'{case}/')
    }
  sizes = ast.literal_eval(str(fixture.pop('config')))
  assert sizes['kmax'] == sizes['K']
  options = SparseOptions(
    block=sizes['b'],
    tile=sizes['r'],
    window_blocks=sizes['Wb'],
    max_blocks=sizes['K'],
    sinks=sizes['sink'],
    min_blocks=sizes['kmin'],
    temperature=sizes['tau'],
    use_summaries=sizes['use_sum'],
    chunk=48,
  )
  *inputs, cotangent = draw_inputs(case, sizes, *fixture['o'].shape[:2])
  segments = jnp.ones(cotangent.shape[:2], jnp.int32)

  def loss(q, k, v, theta):
    coverage = jnp.repeat(jnp.moveaxis(theta, 1, 2), options.tile, axis=1)
    y, stats = sparse_attention(
      SparseInputs(q, k, v, segments, coverage), options
    )
    return (y * cotangent).sum(), (y, stats)

  run = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))
  gradients, (y, stats) = run(*inputs)
  names = [f'grad_{name}' for name in ('q', 'k', 'v', 'theta')]
  found = dict(zip(names, gradients, strict=True))
  found |= dict(o=y, idx=stats['block'], kept=stats['is_kept'])
  found = {
    name: np.asarray(x[tuple(map(slice, fixture[name].shape))])
    for name, x in found.items()
  }
  np.testing.assert_array_equal(found.pop('kept'), fixture.pop('kept'))
  want = fixture.pop('idx')
  eligible = np.asarray(stats['eligible'][:, : want.shape[1]])
  has_block = np.arange(options.max_blocks) < eligible[..., None]
  np.testing.assert_array_equal(found.pop('idx')[has_block], want[has_block])
  assert found.keys() == fixture.keys()
  for name, want in fixture.items():
    error = np.abs(found[name] - want).max() / np.abs(want).max()
    assert error < 1e-10, (name, error)


B, N, K, H = 2, 4, 2, 4
OPTIONS = SparseOptions(block=4, tile=2, window_blocks=1, max_blocks=3, chunk=8)
ALL = jnp.inf


def make_inputs(length=30, seed=0, num_kv_heads=K):
  rng = np.random.default_rng(seed)
  heads = [(B, length, n, H) for n in (N, num_kv_heads, num_kv_heads)]
  return [jnp.asarray(rng.normal(size=shape)) for shape in heads]


@functools.partial(jax.jit, static_argnames='options')
def run(q, k, v, *, options=OPTIONS, coverage=0.8, segments=None, gates=None):
  if segments is None:
    segments = jnp.ones(q.shape[:2], jnp.int32)
  if jnp.ndim(coverage) == 0:
    coverage = jnp.full((*q.shape[:2], k.shape[2]), coverage)
  return sparse_attention(
    SparseInputs(q, k, v, segments, coverage, gates), options
  )


def dense(q, k, v, segments=None, **how):
  if segments is None:
    segments = jnp.ones(q.shape[:2], jnp.int32)
  rows = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
  return attention(q, k, v, rows, rows, segments, segments, **how)


def value_and_gradients(function, inputs):
  def loss(*inputs):
    y = function(*inputs)
    y = y[0] if isinstance(y, tuple) else y
    return jnp.sin(y).sum(), y

  gradients, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs)
  return y, *gradients


@pytest.mark.parametrize(
  ('tile', 'window_blocks'),
  few([(1, 2), (4, 1), (16, 0)], itertools.product([1, 4, 16], [0, 1, 2])),
)
def test_keeping_every_block_is_dense_attention(tile, window_blocks):
  options = SparseOptions(
    block=16, tile=tile, window_blocks=window_blocks, max_blocks=5
  )
  inputs = make_inputs(70)
  y, _ = run(*inputs, options=options, coverage=ALL)
  np.testing.assert_allclose(y, dense(*inputs), rtol=0, atol=2e-15)


def test_keeping_every_block_is_dense_attention_in_single_precision():
  with jax.enable_x64(False):
    inputs = make_inputs(70)
    options = SparseOptions(block=16, tile=4, window_blocks=1, max_blocks=5)
    y, _ = run(*inputs, options=options, coverage=ALL)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, dense(*inputs), rtol=0, atol=4e-7)


@pytest.mark.parametrize('num_kv_heads', few([2], [1, 2, 4]))
def test_keeping_every_block_has_the_gradients_of_dense_attention(num_kv_heads):
  options = dataclasses.replace(OPTIONS, max_blocks=8)
  inputs = make_inputs(num_kv_heads=num_kv_heads)
  got = value_and_gradients(
    lambda *x: run(*x, options=options, coverage=ALL), inputs
  )
  want = value_and_gradients(dense, inputs)
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-14)


def test_nothing_but_the_window_is_a_banded_mask():
  options = dataclasses.replace(
    OPTIONS, max_blocks=1, sinks=0, min_blocks=0, use_summaries=False
  )
  q, k, v = make_inputs()
  y, stats = run(q, k, v, options=options, coverage=-ALL)
  rows = np.arange(q.shape[1])
  is_near = rows[:, None] // 4 - rows[None] // 4 <= 1
  mask = is_near & (rows[None] <= rows[:, None])
  k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
  scores = np.einsum('btnh,bsnh->bnts', q, k) / np.sqrt(H)
  weights = np.where(mask, np.exp(scores), 0)
  weights /= weights.sum(-1, keepdims=True)
  np.testing.assert_allclose(
    y, np.einsum('bnts,bsnh->btnh', weights, v), rtol=0, atol=1e-14
  )
  np.testing.assert_array_equal(stats['kept'], 0)
  np.testing.assert_allclose(stats['shares'][..., 0], 1, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
  'change', [pytest.param(8, marks=pytest.mark.slow), 10, 11]
)
def test_later_rows_change_nothing(change):
  inputs = make_inputs(20)
  coverage = jax.random.uniform(jax.random.key(0), (B, 20, K))
  changed = [x.at[:, change:].add(1.0) for x in inputs]
  before, _ = run(*inputs, coverage=coverage)
  after, _ = run(*changed, coverage=coverage.at[:, change:].set(0.1))
  np.testing.assert_array_equal(before[:, :change], after[:, :change])
  assert (before[:, change:] != after[:, change:]).all()


@pytest.mark.parametrize('tied', ['', 'queries', 'keys'])
def test_choice_does_not_depend_on_the_length(tied):
  """Also where all scores tie, and the first of equals must be taken."""
  q, k, v = make_inputs(40)
  if tied == 'queries':
    q = jnp.zeros_like(q)
  if tied == 'keys':
    k = jnp.zeros_like(k)
  long, of_long = run(q, k, v)
  short, of_short = run(q[:, :28], k[:, :28], v[:, :28])
  np.testing.assert_array_equal(long[:, :28], short)
  for name in ('block', 'is_kept'):
    want = of_short[name]
    np.testing.assert_array_equal(of_long[name][:, :, : want.shape[2]], want)


def test_blocks_of_equal_keys_need_not_be_kept():
  """Then a summary says all that is known of a block."""
  q, k, v = make_inputs(32)
  k = jnp.repeat(k[:, ::4], 4, axis=1)
  for max_blocks in (1, 3):
    options = dataclasses.replace(OPTIONS, max_blocks=max_blocks)
    y, _ = run(q, k, v, options=options, coverage=0.3)
    np.testing.assert_allclose(y, dense(q, k, v), rtol=0, atol=1e-14)


def test_permuting_heads_of_a_group_permutes_the_result():
  q, k, v = make_inputs()
  order = np.array([1, 0, 3, 2])
  y, stats = run(q, k, v)
  permuted, others = run(q[:, :, order], k, v)
  np.testing.assert_array_equal(permuted, y[:, :, order])
  for name in ('block', 'is_kept', 'kept'):
    np.testing.assert_array_equal(others[name], stats[name])


def test_documents_on_the_grid_are_as_if_apart():
  inputs = make_inputs(32)
  segments = jnp.asarray(np.repeat([[1, 2], [1, 3]], [20, 12], axis=1))
  packed, _ = run(*inputs, segments=segments)
  for part in (slice(0, 20), slice(20, 32)):
    alone, _ = run(*(x[:, part] for x in inputs))
    np.testing.assert_allclose(packed[:, part], alone, rtol=0, atol=1e-14)


def test_documents_anywhere_are_dense_attention_if_all_is_kept():
  inputs = make_inputs(32)
  segments = np.ones((B, 32), np.int32)
  segments[0, 13:] = 2
  segments[1, 5:] = 2
  segments[1, 22:] = 3
  segments[0, :3] = 0
  segments[1, 30:] = 0
  segments = jnp.asarray(segments)
  options = dataclasses.replace(OPTIONS, max_blocks=8)
  y, _ = run(*inputs, options=options, coverage=ALL, segments=segments)
  np.testing.assert_allclose(y, dense(*inputs, segments), rtol=0, atol=1e-14)
  np.testing.assert_array_equal(y[0, :3], 0.0)


@pytest.mark.parametrize(
  'how',
  [
    dict(
      coverage=-ALL, options=dataclasses.replace(OPTIONS, sinks=0, min_blocks=0)
    ),
    pytest.param(
      dict(coverage=0.5, options=dataclasses.replace(OPTIONS, max_blocks=8)),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      dict(coverage=0.5, options=dataclasses.replace(OPTIONS, window_blocks=9)),
      marks=pytest.mark.slow,
    ),
    dict(options=dataclasses.replace(OPTIONS, combine='gated')),
  ],
  ids=['all dropped', 'more candidates than blocks', 'none eligible', 'gated'],
)
@pytest.mark.parametrize(
  'scale', [pytest.param(1.0, marks=pytest.mark.slow), 300.0]
)
def test_gradients_are_finite(how, scale):
  q, k, v = make_inputs()
  found = value_and_gradients(lambda *x: run(*x, **how), (scale * q, k, v))
  assert all(np.isfinite(x).all() for x in found)


def test_coverage_has_a_gradient_where_it_can_change_the_choice():
  q, k, v = make_inputs()

  def loss(coverage):
    return jnp.sin(run(q, k, v, coverage=coverage)[0]).sum()

  coverage = jnp.full((B, 30, K), 0.6)
  gradient = np.asarray(jax.grad(loss)(coverage))
  # Tiles begin at even rows; the first with an eligible block is at 8.
  assert (gradient[:, 1::2] == 0).all()
  assert (gradient[:, :8] == 0).all()
  assert (np.abs(gradient[:, 16::2]) > 0).all()


@pytest.mark.parametrize('coverage', [0.0, 0.7, ALL])
def test_kept_blocks_are_within_bounds(coverage):
  inputs = make_inputs(64)
  counted = dataclasses.replace(OPTIONS, max_blocks=5, min_blocks=2)
  fraction = dataclasses.replace(
    OPTIONS, max_blocks=16, sinks=1, min_fraction=0.2, max_fraction=0.5
  )
  for options in (counted, fraction):
    _, stats = run(*inputs, options=options, coverage=coverage)
    kept = np.round(np.asarray(stats['kept']), 12)
    eligible = np.asarray(stats['eligible'])
    if options is counted:
      least, most = np.minimum(eligible, 2), np.minimum(eligible, 5)
    else:
      least = np.ceil(0.2 * eligible)
      most = np.where(eligible, np.maximum(1, np.ceil(0.5 * eligible)), 0)
    assert (kept >= least).all()
    assert (kept <= most).all()


@pytest.mark.parametrize('chunk', [pytest.param(8, marks=pytest.mark.slow), 12])
def test_queries_may_come_in_parts(chunk):
  """What comes after them in the keys may be anything."""
  q, k, v = make_inputs(36)
  expected, _ = run(q, k, v)
  segments, coverage = jnp.ones((B, 36), jnp.int32), jnp.full((B, 36, K), 0.8)
  for begin in range(0, 36, chunk):
    part = slice(begin, begin + chunk)
    past = [x.at[:, begin + chunk :].set(1e3) for x in (k, v)]
    y, _ = sparse_attention(
      SparseInputs(q[:, part], *past, segments[:, part], coverage[:, part]),
      dataclasses.replace(OPTIONS, chunk=512),
      key_segments=segments,
      first_row=begin,
    )
    np.testing.assert_allclose(y, expected[:, part], rtol=0, atol=1e-14)


def test_memory_grows_with_the_length_and_not_its_square():
  options = dataclasses.replace(
    OPTIONS, block=16, tile=16, max_blocks=4, chunk=256
  )

  def temporaries(length):
    x = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)

    def loss(q, k, v):
      coverage = jnp.full((1, length, 2), 0.8, jnp.float32)
      segments = jnp.ones((1, length), jnp.int32)
      y, _ = sparse_attention(
        SparseInputs(q, k, v, segments, coverage), options
      )
      return jnp.sin(y).sum()

    lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  lengths = (2048, 16384, 65536)
  slopes = np.diff(list(map(temporaries, lengths))) / np.diff(lengths)
  assert slopes[1] < 1.05 * slopes[0]


def test_gated_is_three_softmaxes():
  """By a loop over queries, with the blocks that were chosen (as NSA has it).

  All complete blocks have a summary, those of the window and kept ones too.
  """
  options = dataclasses.replace(OPTIONS, tile=1, combine='gated')
  q, k, v = inputs = make_inputs(22)
  gates = jax.random.uniform(jax.random.key(3), (B, 22, N, 3), float, 0.2, 1.0)
  y, stats = run(*inputs, options=options, gates=gates)

  def softmax(query, keys, values, counts=1.0):
    weights = counts * np.exp(keys @ query / np.sqrt(H))
    return weights @ values / weights.sum()

  q, k, v, g = (np.asarray(x) for x in (*inputs, gates))
  for b, t, n in np.ndindex(B, 22, N):
    head, own = n // (N // K), t // options.block
    key, value = k[b, :, head], v[b, :, head]
    begin = max(own - options.window_blocks, 0) * options.block
    want = g[b, t, n, 0] * softmax(
      q[b, t, n], key[begin : t + 1], value[begin : t + 1]
    )
    kept = stats['block'][b, head, t][stats['is_kept'][b, head, t]]
    rows = [options.block * z + i for z in kept.tolist() for i in range(4)]
    if rows:
      want = want + g[b, t, n, 1] * softmax(q[b, t, n], key[rows], value[rows])
    if own:
      keys, values = (
        x[: own * options.block].reshape(own, options.block, H).mean(1)
        for x in (key, value)
      )
      want = want + g[b, t, n, 2] * softmax(q[b, t, n], keys, values)
    np.testing.assert_allclose(y[b, t, n], want, rtol=0, atol=1e-12)


PARTS = dict(
  prompt=(10, *[1] * 20), mixed=(7, 1, 1, 1, 5, 1, 1, 13), ones=(1,) * 30
)
QUICK = [(4, 'mixed')]


@pytest.mark.parametrize(
  ('tile', 'parts'),
  [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in itertools.product((1, 2, 4), PARTS)
  ],
)
def test_a_cache_gives_the_same_at_every_row(tile, parts):
  """Two documents, padding before one, and room in the cache behind them.

  What is in the cache at first is of another sequence, and large.
  """
  options = dataclasses.replace(OPTIONS, tile=tile)
  inputs = make_inputs(30)
  segments = np.ones((B, 30), np.int32)
  segments[0, 18:] = 2
  segments[1, :3] = 0
  segments = jnp.asarray(segments)
  coverage = jax.random.uniform(jax.random.key(1), (B, 30, K), float)
  gates = jax.random.uniform(jax.random.key(2), (B, 30, N, 3), float, 0.5, 1.5)
  expected, _ = run(
    *inputs, options=options, coverage=coverage, segments=segments, gates=gates
  )
  cache = jax.tree.map(
    lambda x: jnp.full_like(x, 1 if x.dtype.kind in 'ib' else 1e30),
    init_sparse_cache(B, K, 37, H, options, jnp.float64),
  )
  step = jax.jit(cached_sparse_attention, static_argnames='options')
  begin = 0
  for length in PARTS[parts]:
    part = slice(begin, begin + length)
    arrays = [x[:, part] for x in (*inputs, segments, coverage, gates)]
    y, cache, _ = step(
      SparseInputs(*arrays), cache, jnp.int32(begin), options=options
    )
    np.testing.assert_allclose(y, expected[:, part], rtol=0, atol=1e-13)
    begin += length
