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


@functools.partial(jax.jit, static_argnums=range(7))
def draw_inputs(case, batch, length, num_heads, num_kv_heads, width, tile):
  heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
  shapes = [(batch, length, n, width) for n in heads]
  shapes.append((batch, num_kv_heads, length // tile))
  keys = jax.random.split(jax.random.key(CASES.index(case)), 5)
  *arrays, cotangent, theta = map(jax.random.normal, keys, shapes)
  return *arrays, jax.nn.sigmoid(theta), cotangent


@pytest.mark.parametrize('case', few(['r8'], CASES))
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
    chunk=96,
  )
  *inputs, cotangent = draw_inputs(
    case, *fixture['o'].shape[:2], *(sizes[n] for n in ('Hq', 'Hk', 'd', 'r'))
  )

  def loss(q, k, v, theta):
    coverage = jnp.repeat(jnp.moveaxis(theta, 1, 2), options.tile, axis=1)
    segments = jnp.ones(q.shape[:2], jnp.int32)
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
    name: np.asarray(x)[tuple(map(slice, fixture[name].shape))]
    for name, x in found.items()
  }
  np.testing.assert_array_equal(found.pop('kept'), fixture.pop('kept'))
  want = fixture.pop('idx')
  eligible = np.asarray(stats['eligible'])[:, : want.shape[1]]
  has_block = np.arange(options.max_blocks) < eligible[..., None]
  np.testing.assert_array_equal(found.pop('idx')[has_block], want[has_block])
  assert found.keys() == fixture.keys()
  for name, want in fixture.items():
    error = np.abs(found[name] - want).max() / np.abs(want).max()
    assert error < 1e-10, (name, error)


B, N, K, H = 2, 4, 2, 4
OPTIONS = SparseOptions(block=4, tile=2, window_blocks=1, max_blocks=3, chunk=8)
ALL = np.inf
# Rows where nothing asks for others: what has one shape shares one program.
ROWS = 36


def make_inputs(length=ROWS, seed=0, num_kv_heads=K):
  rng = np.random.default_rng(seed)
  heads = [(B, length, n, H) for n in (N, num_kv_heads, num_kv_heads)]
  return [rng.normal(size=shape) for shape in heads]


def complete(q, k, v, *, coverage=0.8, segments=None, gates=None):
  """All arrays, whichever are given, again for the sake of one program."""
  if segments is None:
    segments = np.ones(q.shape[:2], np.int32)
  if gates is None:
    gates = np.ones((*q.shape[:3], 3))
  coverage = np.broadcast_to(coverage, (*q.shape[:2], k.shape[2]))
  return SparseInputs(q, k, v, segments, coverage, gates)


compiled = jax.jit(sparse_attention, static_argnames='options')


def run(*inputs, options=OPTIONS, **arrays):
  return jax.tree.map(
    np.asarray, compiled(complete(*inputs, **arrays), options=options)
  )


@jax.jit
def dense(q, k, v, segments=None):
  if segments is None:
    segments = jnp.ones(q.shape[:2], jnp.int32)
  rows = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
  return attention(q, k, v, rows, rows, segments, segments)


@functools.partial(jax.jit, static_argnames='options')
def run_with_gradients(inputs, options=None):
  """Of queries, keys, values and coverage; of dense attention by default."""

  def loss(q, k, v, coverage):
    if options is None:
      y = dense(q, k, v, inputs.segments)
    else:
      of_loss = SparseInputs(q, k, v, inputs.segments, coverage, inputs.gates)
      y, _ = sparse_attention(of_loss, options)
    return jnp.sin(y).sum(), y

  gradients, y = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(
    *inputs[:3], inputs.coverage
  )
  return y, *gradients


# Of all blocks, and with two parts of chunks.
KEEPING_ALL = dataclasses.replace(OPTIONS, max_blocks=8)


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
  inputs = complete(*make_inputs(30, num_kv_heads=num_kv_heads), coverage=ALL)
  *got, _ = run_with_gradients(inputs, KEEPING_ALL)
  *want, _ = run_with_gradients(inputs)
  for x, y in zip(got, want, strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-14)


def test_nothing_but_the_window_is_a_banded_mask():
  options = dataclasses.replace(
    OPTIONS, max_blocks=1, sinks=0, min_blocks=0, use_summaries=False
  )
  q, k, v = make_inputs(30)
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
  inputs = make_inputs()
  coverage = np.random.default_rng(1).uniform(size=(B, ROWS, K))
  is_later = np.arange(ROWS)[None, :, None] >= change
  changed = [x + is_later[..., None] for x in inputs]
  before, _ = run(*inputs, coverage=coverage)
  after, _ = run(*changed, coverage=np.where(is_later, 0.1, coverage))
  np.testing.assert_array_equal(before[:, :change], after[:, :change])
  assert (before[:, change:] != after[:, change:]).all()


@pytest.mark.parametrize('tied', ['', 'queries', 'keys'])
def test_choice_does_not_depend_on_the_length(tied):
  """Also where all scores tie, and the first of equals must be taken."""
  q, k, v = make_inputs()
  if tied == 'queries':
    q = np.zeros_like(q)
  if tied == 'keys':
    k = np.zeros_like(k)
  long, of_long = run(q, k, v)
  short, of_short = run(q[:, :28], k[:, :28], v[:, :28])
  np.testing.assert_array_equal(long[:, :28], short)
  for name in ('block', 'is_kept'):
    want = of_short[name]
    np.testing.assert_array_equal(of_long[name][:, :, : want.shape[2]], want)


def test_blocks_of_equal_keys_need_not_be_kept():
  """Then a summary says all that is known of a block."""
  q, k, v = make_inputs()
  k = np.repeat(k[:, ::4], 4, axis=1)
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
  inputs = make_inputs()
  lengths = (20, ROWS - 20)
  segments = np.repeat([[1, 2], [1, 3]], lengths, axis=1).astype(np.int32)
  packed, _ = run(*inputs, segments=segments)
  for begin, length in ((0, lengths[0]), lengths):
    # First of all, with padding behind it.
    moved = [np.roll(x, -begin, axis=1) for x in inputs]
    is_own = np.broadcast_to(np.arange(ROWS) < length, (B, ROWS))
    alone, _ = run(*moved, segments=is_own.astype(np.int32))
    np.testing.assert_allclose(
      packed[:, begin : begin + length], alone[:, :length], rtol=0, atol=1e-14
    )


def test_documents_anywhere_are_dense_attention_if_all_is_kept():
  segments = np.ones((B, 30), np.int32)
  segments[0, 13:] = 2
  segments[1, 5:] = 2
  segments[1, 22:] = 3
  segments[0, :3] = 0
  segments[1, 28:] = 0
  inputs = complete(*make_inputs(30), coverage=ALL, segments=segments)
  y, *_ = run_with_gradients(inputs, KEEPING_ALL)
  want, *_ = run_with_gradients(inputs)
  np.testing.assert_allclose(y, want, rtol=0, atol=1e-14)
  np.testing.assert_array_equal(np.asarray(y)[0, :3], 0.0)


@pytest.mark.parametrize(
  ('coverage', 'options'),
  [
    (-ALL, dataclasses.replace(OPTIONS, sinks=0, min_blocks=0)),
    pytest.param(
      0.5,
      dataclasses.replace(OPTIONS, max_blocks=8),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      0.5,
      dataclasses.replace(OPTIONS, window_blocks=9),
      marks=pytest.mark.slow,
    ),
    (0.8, dataclasses.replace(OPTIONS, combine='gated')),
  ],
  ids=['all dropped', 'more candidates than blocks', 'none eligible', 'gated'],
)
@pytest.mark.parametrize(
  'scale', [pytest.param(1.0, marks=pytest.mark.slow), 300.0]
)
def test_gradients_are_finite(coverage, options, scale):
  q, k, v = make_inputs(30)
  inputs = complete(scale * q, k, v, coverage=coverage)
  # All in one part, which compiles faster than two.
  options = dataclasses.replace(options, chunk=32)
  assert all(np.isfinite(x).all() for x in run_with_gradients(inputs, options))


def test_coverage_has_a_gradient_where_it_can_change_the_choice():
  inputs = complete(*make_inputs(30), coverage=0.6)
  *_, gradient = map(np.asarray, run_with_gradients(inputs, KEEPING_ALL))
  # Tiles begin at even rows; the first with an eligible block is at 8.
  assert (gradient[:, 1::2] == 0).all()
  assert (gradient[:, :8] == 0).all()
  assert (np.abs(gradient[:, 16::2]) > 0).all()


@pytest.mark.parametrize('coverage', [0.0, 0.7, ALL])
def test_kept_blocks_are_within_bounds(coverage):
  inputs = make_inputs(64)
  counted = dataclasses.replace(OPTIONS, max_blocks=5, min_blocks=2, chunk=64)
  fraction = dataclasses.replace(
    counted, max_blocks=16, min_blocks=1, min_fraction=0.2, max_fraction=0.5
  )
  for options in (counted, fraction):
    _, stats = run(*inputs, options=options, coverage=coverage)
    kept, eligible = np.round(stats['kept'], 12), stats['eligible']
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
  q, k, v = make_inputs()
  expected, _ = run(q, k, v)
  segments = np.ones((B, ROWS), np.int32)
  coverage = np.full((B, ROWS, K), 0.8)
  for begin in range(0, ROWS, chunk):
    part = slice(begin, begin + chunk)
    is_later = np.arange(ROWS)[None, :, None, None] >= begin + chunk
    past = [np.where(is_later, 1e3, x) for x in (k, v)]
    y, _ = compiled(
      SparseInputs(q[:, part], *past, segments[:, part], coverage[:, part]),
      options=dataclasses.replace(OPTIONS, chunk=512),
      key_segments=segments,
      first_row=np.int32(begin),
    )
    np.testing.assert_allclose(y, expected[:, part], rtol=0, atol=1e-14)


@pytest.mark.slow
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
  q, k, v = make_inputs(22)
  g = np.random.default_rng(3).uniform(0.2, 1.0, (B, 22, N, 3))
  y, stats = run(q, k, v, options=options, gates=g)

  def softmax(query, keys, values, counts=1.0):
    weights = counts * np.exp(keys @ query / np.sqrt(H))
    return weights @ values / weights.sum()

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
  prompt=(10, *[1] * 20), mixed=(7, 1, 1, 1, 7, 7, *[1] * 6), ones=(1,) * 30
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
  rng = np.random.default_rng(1)
  coverage = rng.uniform(size=(B, 30, K))
  gates = rng.uniform(0.5, 1.5, (B, 30, N, 3))
  expected, _ = run(
    *inputs, options=options, coverage=coverage, segments=segments, gates=gates
  )
  cache = jax.tree.map(
    lambda x: np.full(x.shape, 1 if x.dtype.kind in 'ib' else 1e30, x.dtype),
    jax.eval_shape(
      lambda: init_sparse_cache(B, K, 37, H, options, jnp.float64)
    ),
  )
  step = jax.jit(cached_sparse_attention, static_argnames='options')
  begin = 0
  for length in PARTS[parts]:
    part = slice(begin, begin + length)
    arrays = [x[:, part] for x in (*inputs, segments, coverage, gates)]
    y, cache, _ = step(
      SparseInputs(*arrays), cache, np.int32(begin), options=options
    )
    np.testing.assert_allclose(y, expected[:, part], rtol=0, atol=1e-13)
    begin += length
