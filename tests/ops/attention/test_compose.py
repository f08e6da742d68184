# SPDX-License-Identifier: Apache-2.0
"""Composition of heads: golden numbers, the official maths, its structure."""

import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse.config import DCMHAConfig, ModelConfig
from jaxsparse.nn.attention import cache as attention_cache
from jaxsparse.ops.attention import compose as ops
from jaxsparse.ops.attention import cpu, dense
from jaxsparse.ops.attention.compose import (
  HeadMix,
  compose_reference,
  generate_factors,
)
from jaxsparse.ops.attention.dense import attention

FIXTURE = pathlib.Path(__file__).parents[2] / 'fixtures/dcmha.npz'

# Streams of the generator, in the order of the official checkpoints.
PRE_QUERY, PRE_KEY, POST_QUERY, POST_KEY = range(4)


# NumPy's own relative tolerance of 1e-7 would be the larger one in f64.
assert_close = functools.partial(np.testing.assert_allclose, rtol=0)


@pytest.fixture(autouse=True)
def double_precision():
  with jax.enable_x64(True):
    yield


OPTIONS = (
  'window', 'static', 'key_wise', 'gelu', 'dynamic', 'pre', 'post', 'chunk'
)  # fmt: skip


# Compiled as a whole, and once for all tests that ask for the same.
@functools.partial(jax.jit, static_argnames=OPTIONS)
def composed(
  inputs, *, window=0, static=False, key_wise=True, gelu='tanh', dynamic=True,
  pre=True, post=True, chunk=0,
):  # fmt: skip
  """The official layer between projections and output map."""
  factors = None
  if dynamic:
    factors = generate_factors(
      inputs['x'], inputs['dw1'], inputs['qkw'], inputs['dd'], gelu
    )

  def mix(query, key, base):
    return HeadMix(
      query=None if factors is None else factors[:, :, query],
      key=factors[:, :, key] if dynamic and key_wise else None,
      base=inputs['static'][base] if static else None,
      num_groups=inputs['qkw'].shape[0],
    )

  batch, length = inputs['x'].shape[:2]
  positions = jnp.tile(jnp.arange(length), (batch, 1))
  segments = jnp.ones((batch, length), jnp.int32)
  return attention(
    *(inputs[name] for name in 'qkv'),
    positions,
    positions,
    segments,
    segments,
    window=window,
    pre=mix(PRE_QUERY, PRE_KEY, 0) if pre else None,
    post=mix(POST_QUERY, POST_KEY, 1) if post else None,
    chunk=chunk,
  )


def sequence(shape, a, b, s):
  return s * np.sin(a * np.arange(np.prod(shape)) + b).reshape(shape)


def scaled(x, index, factor):
  """x, of which a part is multiplied."""
  x = np.array(x)
  x[index] *= factor
  return x


READING, WRITING = np.s_[:, :, :, :2], np.s_[:, :, :, 2:]


def golden_inputs():
  heads = (1, 6, 4, 4)
  return dict(
    x=sequence((1, 6, 16), 0.7, 0.1, 1),
    q=sequence(heads, 0.9, 0.2, 1),
    k=sequence(heads, 1.1, 0.3, 1),
    v=sequence(heads, 1.3, 0.4, 1),
    dw1=sequence((16, 1, 4, 16), 0.37, 0.5, 0.3),
    qkw=sequence((1, 4, 16, 4, 4), 0.53, 0.6, 0.2),
    dd=sequence((16, 1, 16), 0.61, 0.7, 0.1),
    static=sequence((2, 1, 4, 4), 0.43, 0.8, 0.1),
  )


# Sum, sum of squares, and the last query's first head.
GOLDEN = dict(
  plain=(
    dict(pre=False, post=False),
    (2.043188494027, 15.012132917163),
    (0.0773989229, 0.1673460025, 0.0121307963, -0.1608560549),
  ),
  full=(
    dict(),
    (1.892712082953, 14.121407302276),
    (0.0489154090, 0.1314847541, 0.0214286264, -0.1200204892),
  ),
  window=(
    dict(window=3),
    (0.882024116929, 15.790818171746),
    (0.2242904680, 0.3649614997, -0.0290369207, -0.3804961843),
  ),
  static=(
    dict(static=True),
    (1.978439992354, 15.828138525085),
    (0.0069141036, 0.1540422602, 0.0754981447, -0.1136509296),
  ),
  query_only=(
    dict(key_wise=False),
    (1.756195093446, 14.020509568069),
    (0.0262117325, 0.1267571121, 0.0416030256, -0.1044995909),
  ),
  erf=(
    dict(gelu='erf'),
    (1.892710031076, 14.121405236170),
    (0.0489149517, 0.1314846107, 0.0214290070, -0.1200201422),
  ),
  talking_heads=(
    dict(dynamic=False, static=True),
    (2.136088290551, 16.809931418887),
    (0.0389215487, 0.1992797372, 0.0676926438, -0.1630643314),
  ),
  pre_only=(
    dict(post=False),
    (2.004270716080, 14.638923159339),
    (0.0430360781, 0.1160192232, 0.0190339345, -0.1058361129),
  ),
  post_only=(
    dict(pre=False),
    (1.916371215839, 14.517325757001),
    (0.0825135771, 0.1819148489, 0.0148104409, -0.1739912977),
  ),
)


@pytest.mark.parametrize('name', GOLDEN)
def test_golden_numbers(name):
  options, sums, row = GOLDEN[name]
  y = np.asarray(composed(golden_inputs(), **options))
  assert_close((y.sum(), (y**2).sum()), sums, atol=1e-12)
  assert_close(y[0, 5, 0], row, atol=1e-10)


compose = jax.jit(ops.compose)


@jax.jit
def factors_of(inputs):
  return generate_factors(*(inputs[name] for name in ('x', 'dw1', 'qkw', 'dd')))


def test_golden_factors():
  factors = np.asarray(factors_of(golden_inputs()))
  read, write = factors[0, 2, PRE_QUERY, 0], factors[0, 2, PRE_QUERY, 2]
  gate = factors[0, 2, PRE_KEY, -1]
  for got, want in (
    (read, (-1.28481714, -1.23848366, -0.85232778, -0.23230521)),
    (write, (0.00869968, 0.00195299, -0.00532958, -0.01114978)),
    (gate, (-0.04899416, -0.02161113, 0.01360002, 0.04388214)),
  ):
    assert_close(got, want, atol=1e-8)


def test_golden_scores_and_row_sums():
  inputs = golden_inputs()
  factors = np.asarray(factors_of(inputs))
  of_query, of_key = (
    jnp.asarray(factors[:, :, stream]) for stream in (PRE_QUERY, PRE_KEY)
  )
  mix = HeadMix(query=of_query, key=of_key)
  score = np.einsum('btnh,bsnh->btns', inputs['q'], inputs['k']) / 2
  assert_close(
    np.asarray(compose(score, mix))[0, 5, 0],
    (-0.60332876, -0.51403849, 0.22318063, 0.66246597, 0.24808603, -0.58607267),
    atol=1e-8,
  )
  inputs['v'] = np.ones_like(inputs['v'])
  assert_close(
    np.asarray(composed(inputs))[0, 5, :, 0],
    (0.88569517, 0.91249106, 0.97163005, 1.04249363),
    atol=1e-8,
  )


def causal_softmax(score):
  """[T, N, S] in NumPy."""
  length = len(score)
  is_later = np.arange(length)[:, None] < np.arange(length)
  weight = np.exp(np.where(is_later[:, None], -np.inf, score))
  return weight / weight.sum(-1, keepdims=True)


def test_base_alone_is_talking_heads():
  """Written as in arXiv:2003.02436, by a matrix on each side."""
  inputs = golden_inputs()
  q, k, v = (inputs[name][0] for name in 'qkv')
  before, after = np.eye(4) + inputs['static'][:, 0]
  score = np.einsum('tmh,smh,mn->tns', q, k, before) / 2
  weight = np.einsum('tms,mn->tns', causal_softmax(score), after)
  expected = np.einsum('tns,snh->tnh', weight, v)
  y = composed(inputs, dynamic=False, static=True)
  assert_close(np.asarray(y)[0], expected, atol=1e-14)


def test_query_wise_equals_its_absorbed_form():
  """Reading all heads' keys at once, by a query as wide as the model."""
  inputs = golden_inputs()
  q, k, v = (inputs[name][0] for name in 'qkv')
  factors = np.asarray(factors_of(inputs))[0]

  def parts(stream):
    return np.split(factors[:, stream], [2, 4], axis=1)

  read, write, gate = parts(PRE_QUERY)
  wide = (read[..., None] * q[:, None]).reshape(6, 2, 16)
  score = np.einsum('tnh,snh->tns', (1 + gate[:, 0, :, None]) * q, k)
  score += np.einsum('trn,trd,sd->tns', write, wide, k.reshape(6, 16))
  weight = causal_softmax(score / 2)
  read, write, gate = parts(POST_QUERY)
  mixed = np.einsum('trm,tms->trs', read, weight)
  expected = (1 + gate[:, 0, :, None]) * np.einsum('tns,snh->tnh', weight, v)
  expected += np.einsum('trn,trs,snh->tnh', write, mixed, v)
  y = composed(inputs, key_wise=False)
  assert_close(np.asarray(y)[0], expected, atol=1e-14)


def official_arrays():
  with np.load(FIXTURE) as data:
    return {name: data[name] for name in data.files}


@pytest.mark.parametrize('chunk', [pytest.param(0, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize(
  ('case', 'options'),
  [
    ('full', {}),
    ('window', dict(window=4)),
    pytest.param('static', dict(static=True), marks=pytest.mark.slow),
    pytest.param('query_only', dict(key_wise=False), marks=pytest.mark.slow),
  ],
)
def test_equals_the_official_layer(case, options, chunk):
  arrays = official_arrays()
  names = ('x', 'q', 'k', 'v', 'dw1', 'qkw', 'dd')
  names += ('static',) if case == 'static' else ()
  inputs = {name: arrays[name] for name in names}

  def loss(inputs):
    y = composed(inputs, chunk=chunk, **options)
    return (y * arrays['cot']).sum(), y

  gradients, y = jax.jit(jax.grad(loss, has_aux=True))(inputs)
  for got, want in [(y, arrays[f'{case}/o'])] + [
    (gradients[name], arrays[f'{case}/grad_{name}']) for name in names
  ]:
    error = np.abs(got - want).max() / np.abs(want).max()
    assert error < 1e-10, error


def random_mix(seed, num_groups, parts=('query', 'key', 'base')):
  """B = 2, T = 5, S = 7, N = 6, R = 2; scores [B, T, N, S]."""
  rng = np.random.default_rng(seed)
  group = 6 // num_groups
  shapes = dict(
    query=(2, 5, 5, 6), key=(2, 7, 5, 6), base=(num_groups, group, group)
  )
  arrays = {n: jnp.asarray(rng.normal(size=shapes[n])) for n in parts}
  return HeadMix(num_groups=num_groups, **arrays)


SCORE = np.random.default_rng(9).normal(size=(2, 5, 6, 7)).astype(np.float32)
EACH = [(), ('query',), ('key',), ('base',)]
ALL = ('query', 'key', 'base')


@pytest.mark.parametrize(
  ('parts', 'num_groups'),
  few(
    [*((parts, 2) for parts in EACH), (ALL, 1), (ALL, 2), (ALL, 6)],
    itertools.product([*EACH, ALL], [1, 2, 6]),
  ),
)
def test_equals_the_reference(parts, num_groups, monkeypatch):
  mix = random_mix(0, num_groups, parts)
  score = SCORE.astype(np.float64)
  cotangent = np.cos(score)

  @functools.partial(jax.jit, static_argnums=0)
  def with_gradients(function):
    y, backward = jax.vjp(function, score, mix)
    return y, backward(cotangent)

  expected = jax.tree.leaves(with_gradients(compose_reference))
  for by_matrices in (True, False):
    monkeypatch.setattr(
      cpu, 'composes_faster', lambda a, is_so=by_matrices: is_so
    )
    found = with_gradients(functools.partial(ops.compose))
    for got, want in zip(jax.tree.leaves(found), expected, strict=True):
      assert_close(got, want, atol=1e-12)


def test_zero_in_all_heads_stays_zero():
  score = scaled(SCORE, np.s_[..., 3:], 0.0)
  y = np.asarray(compose(score, random_mix(1, 2)))
  np.testing.assert_array_equal(y[..., 3:], 0.0)
  assert (np.abs(y[..., :3]) > 0).all()


def test_groups_do_not_meet():
  mix = random_mix(2, 2)
  changed = scaled(SCORE, np.s_[:, :, :3], 2.0)
  before, after = (np.asarray(compose(x, mix)) for x in (SCORE, changed))
  np.testing.assert_array_equal(before[:, :, 3:], after[:, :, 3:])
  assert (before[:, :, :3] != after[:, :, :3]).all()


def grouped_inputs():
  """The golden ones for two groups of two heads."""
  return golden_inputs() | dict(
    dw1=sequence((16, 2, 4, 8), 0.37, 0.5, 0.3),
    qkw=sequence((2, 4, 8, 4, 2), 0.53, 0.6, 0.2),
    dd=sequence((16, 2, 8), 0.61, 0.7, 0.1),
    static=sequence((2, 2, 2, 2), 0.43, 0.8, 0.1),
  )


def test_each_group_has_a_generator_of_its_own():
  inputs = grouped_inputs()
  apart = [
    factors_of(
      dict(
        x=inputs['x'],
        dw1=inputs['dw1'][:, g : g + 1],
        qkw=inputs['qkw'][g : g + 1],
        dd=inputs['dd'][:, g : g + 1],
      )
    )
    for g in range(2)
  ]
  assert_close(factors_of(inputs), np.concatenate(apart, axis=-1), atol=1e-15)


def test_a_group_without_parameters_is_plain_and_alone():
  inputs = grouped_inputs()
  zeroed = inputs | dict(
    qkw=scaled(inputs['qkw'], 0, 0.0),
    **{
      name: scaled(inputs[name], np.s_[:, 0], 0.0)
      for name in ('dw1', 'dd', 'static')
    },
  )
  plain = np.asarray(composed(inputs, pre=False, post=False))
  before, after = (
    np.asarray(composed(x, static=True)) for x in (inputs, zeroed)
  )
  np.testing.assert_array_equal(after[:, :, 2:], before[:, :, 2:])
  np.testing.assert_array_equal(after[:, :, :2], plain[:, :, :2])
  assert (before != plain).all()


def test_permuting_heads_permutes_the_result():
  order = np.array([2, 0, 3, 1])
  inputs = golden_inputs()
  permuted = {
    name: x[:, :, order] if name in 'qkv' else x for name, x in inputs.items()
  }
  gates = inputs['dd'].reshape(16, 1, 4, 4)[..., order]
  permuted |= dict(
    qkw=inputs['qkw'][..., order],
    dd=gates.reshape(16, 1, 16),
    static=inputs['static'][:, :, order][..., order],
  )
  y = np.asarray(composed(inputs, static=True))
  assert_close(composed(permuted, static=True), y[:, :, order], atol=1e-14)


def test_without_factors_nothing_changes():
  inputs = golden_inputs()
  inputs |= dict(qkw=scaled(inputs['qkw'], WRITING, 0.0), dd=0.0 * inputs['dd'])
  np.testing.assert_array_equal(
    composed(inputs), composed(inputs, pre=False, post=False)
  )


def test_later_positions_change_nothing():
  inputs = golden_inputs()
  changed = {
    name: scaled(x, np.s_[:, 4:], 2.0) if name in 'xqkv' else x
    for name, x in inputs.items()
  }
  before, after = (np.asarray(composed(i)) for i in (inputs, changed))
  np.testing.assert_array_equal(before[:, :4], after[:, :4])
  assert (before[:, 4:] != after[:, 4:]).all()


@pytest.mark.parametrize('chunk', [0, 2])
def test_positions_before_the_window_change_nothing(chunk):
  inputs = golden_inputs()
  changed = {
    name: scaled(x, np.s_[:, :2], 2.0) if name in 'xqkv' else x
    for name, x in inputs.items()
  }
  before, after = (
    np.asarray(composed(i, window=3, chunk=chunk)) for i in (inputs, changed)
  )
  np.testing.assert_array_equal(before[:, 4:], after[:, 4:])
  assert (before[:, :4] != after[:, :4]).all()


@pytest.mark.parametrize('window', few([3], [0, 3]))
def test_chunks_of_any_length_give_the_same(window):
  """Of one query, composed by factors, and of four, the last with padding."""

  expected, *found = (
    composed(golden_inputs(), window=window, static=True, chunk=chunk)
    for chunk in (0, 1, 4)
  )
  for y in found:
    assert_close(y, expected, atol=1e-14)


@pytest.mark.parametrize(
  'fields',
  few(
    [dict(attention_pattern=('local',), window=4)],
    [dict(), dict(attention_pattern=('local',), window=4)],
  ),
  ids=str,
)
def test_cached_factors_give_the_same(fields):
  """A prompt, longer than the window, a token, two, and one."""
  config = ModelConfig(
    model_dim=32, num_heads=4, num_kv_heads=4, head_dim=8,
    dcmha=DCMHAConfig(base=True), **fields,
  )  # fmt: skip
  inputs = official_arrays()
  batch, length = inputs['x'].shape[:2]
  has_ring = attention_cache.is_ring(config, 0)
  window = config.window if has_ring else 0
  factors = np.asarray(factors_of(inputs))
  ones = np.ones((batch, length), np.int32)
  rows = dict(
    query=inputs['q'],
    of_query=factors[:, :, [PRE_QUERY, POST_QUERY]],
    key=inputs['k'],
    value=inputs['v'],
    factors=factors[:, :, [PRE_KEY, POST_KEY]],
    positions=ones * np.arange(length, dtype=np.int32),
    segment_ids=ones,
  )

  @jax.jit
  def step(rows, cache):
    query, of_query = rows.pop('query'), rows.pop('of_query')
    keys, cache = attention_cache.append(cache, rows, has_ring)
    pre, post = (
      HeadMix(
        query=of_query[:, :, i],
        key=keys['factors'][:, :, i],
        base=jnp.asarray(inputs['static'][i]),
      )
      for i in range(2)
    )
    y = attention(
      query, keys['key'], keys['value'], rows['positions'], keys['positions'],
      rows['segment_ids'], keys['segment_ids'],
      window=window, pre=pre, post=post,
    )  # fmt: skip
    return y, cache

  @jax.jit
  def init():
    shared = attention_cache.init_shared(config, batch, length)
    of_layer = attention_cache.init_rows(config, 0, batch, length)
    return shared | jax.tree.map(lambda x: x.astype(jnp.float64), of_layer)

  cache = init()
  outputs, begin = [], 0
  for num_new in (6, 1, 2, 1):
    part = {n: x[:, begin : begin + num_new] for n, x in rows.items()}
    y, cache = step(part, cache)
    outputs.append(y)
    begin += num_new
  expected = composed(inputs, window=window, static=True)
  assert_close(np.concatenate(outputs, axis=1), expected, atol=1e-13)


def test_weights_are_no_distribution():
  """Their rows do not sum to one, and some are negative."""
  inputs = golden_inputs()
  inputs['qkw'] = 20 * inputs['qkw']
  # With one-hot values the output is the weights.
  inputs['v'] = np.broadcast_to(np.eye(6)[None, :, None], (1, 6, 4, 6))
  for name in 'qk':
    inputs[name] = np.pad(inputs[name], ((0, 0), (0, 0), (0, 0), (0, 2)))
  weights = np.asarray(composed(inputs))
  assert (weights < 0).any()
  assert (np.abs(weights.sum(-1) - 1) > 1e-3).any()
  later = np.arange(6)[:, None] < np.arange(6)
  np.testing.assert_array_equal(weights[0][later[:, None].repeat(4, 1)], 0.0)


def test_reading_vectors_are_normalised():
  """Their scale counts only where they are as small as the epsilon."""
  inputs = golden_inputs()
  large, larger, small, smaller = (
    np.asarray(
      composed(inputs | dict(qkw=scaled(inputs['qkw'], READING, scale)))
    )
    for scale in (100.0, 1000.0, 1e-3, 1e-4)
  )
  assert_close(large, larger, atol=1e-5)
  assert np.abs(small - smaller).max() > 1e-4


@jax.jit
def gradients_of_generator(generator):
  inputs = golden_inputs()
  return jax.grad(lambda g: jnp.sin(composed(inputs | g)).sum())(generator)


@pytest.mark.parametrize('is_identity', [False, True])
def test_gradients_of_the_generator_at_the_start(is_identity):
  """What reads has none before what writes has moved, and then it has."""
  inputs = golden_inputs()
  generator = {name: inputs[name] for name in ('dw1', 'qkw', 'dd')}
  if is_identity:
    generator['qkw'] = scaled(generator['qkw'], WRITING, 0.0)
    generator['dd'] = np.zeros_like(generator['dd'])
  first = jax.tree.map(np.asarray, gradients_of_generator(generator))
  assert np.abs(first['qkw'][WRITING]).min() > 0
  assert np.abs(first['dd']).min() > 0
  for reads in (first['dw1'], first['qkw'][READING]):
    assert bool(np.abs(reads).max() == 0) == is_identity
  moved = jax.tree.map(lambda x, g: x - 0.1 * g, generator, first)
  second = jax.tree.map(np.asarray, gradients_of_generator(moved))
  assert np.abs(second['dw1']).min() > 0
  assert np.abs(second['qkw'][READING]).min() > 0


@pytest.mark.parametrize('window', few([0], [0, 128]))
def test_memory_of_training_grows_with_the_length_and_not_its_square(
  window, monkeypatch
):
  """A local layer's and a global layer's, whose keys are all of the past."""
  heads, factors = 4, 5
  # Each compiles for itself.
  monkeypatch.setattr(dense, '_STAGES', 2)

  def temporaries(length, window):
    def shape(*sizes):
      return jax.ShapeDtypeStruct((1, length, *sizes), jnp.float32)

    def loss(q, k, v, of_query, of_key):
      mix = HeadMix(query=of_query, key=of_key)
      rows = jnp.arange(length)[None]
      ones = jnp.ones((1, length), jnp.int32)
      y = attention(
        q, k, v, rows, rows, ones, ones,
        window=window, pre=mix, post=mix, chunk=64,
      )  # fmt: skip
      return jnp.sin(y).sum()

    arguments = [shape(heads, 8)] * 3 + [shape(factors, heads)] * 2
    lowered = jax.jit(jax.grad(loss, (0, 1, 2, 3, 4))).lower(*arguments)
    return lowered.compile().memory_analysis().temp_size_in_bytes

  assert temporaries(8192, window) < 9 * temporaries(1024, window)
