# SPDX-License-Identifier: Apache-2.0
"""PKM, PEER, Memory+ and UltraMemV2 against the official layers and oracles."""

import dataclasses
import functools
import itertools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse import mesh as mesh_lib
from jaxsparse.config import MemoryConfig, TableConfig
from jaxsparse.config.errors import UserError
from jaxsparse.config.model import ModelConfig
from jaxsparse.nn.layers import MLP
from jaxsparse.nn.memory import retrieval
from jaxsparse.nn.memory.init import (
  _SCORE_SPREAD,
  initial_scales,
  matched_value_scale,
  parameters,
)
from jaxsparse.nn.memory.layer import MemoryLayer, memory_forward
from jaxsparse.nn.transformer import Transformer
from jaxsparse.ops.memory.product_key import product_key_top_m
from jaxsparse.ops.memory.tucker import tucker_top_m

FIXTURE = pathlib.Path(__file__).parents[2] / 'fixtures/memory_family.npz'


def _official(case):
  arrays = np.load(FIXTURE)
  return {
    name.removeprefix(f'{case}/'): arrays[name]
    for name in arrays.files
    if name.startswith(f'{case}/')
  }


def _params(config, model_dim, seed=0):
  rng = np.random.default_rng(seed)
  declared = parameters(config, model_dim, 1)
  return {
    name: rng.normal(0.3, 0.5, size).astype(np.float32)
    for name, (_, _, size) in declared.items()
  }


def _input(shape=(2, 6, 8), seed=1):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.partial(
  jax.jit, static_argnames=('config', 'salt', 'first_row', 'num_rows')
)
def _compiled_forward(params, x, config, **options):
  return memory_forward(params, x, config, **options)


def _forward(params, x, config, **options):
  """In NumPy: JAX compiles every operation of its arrays outside of jit."""
  return jax.device_get(_compiled_forward(params, x, config, **options))


# The official layers.


def _v2_params(arrays, prefix=''):
  get = lambda name: arrays[prefix + name]  # noqa: E731
  return {
    # Half of the official query map is for other ranks and never used.
    'query': get('query_proj.weight')[:16].T.reshape(32, 2, 8),
    'query_scale': get('query_norm.weight'),
    'keys': get('keys'),
    'key_scale': get('keys_norm.weight'),
    'cores': np.stack([get(f'tucker_core.{i}') for i in range(2)]),
    'value_table': get('full.values_for_look_up'),
    'pre_value_table': get('full.pre_values_for_look_up'),
    'pre_value_map': get('pre_values_proj.weight').T,
    'output': get('values_proj.weight').T[None],
  }


def _memplus_params(arrays, prefix=''):
  get = lambda name: arrays[prefix + name]  # noqa: E731
  query = get('query_proj.weight').T.reshape(32, 2, 2, 8)
  return {
    'query': query.swapaxes(1, 2),
    'query_scale': get('query_norm.weight'),
    'keys': get('keys')[..., None],
    'value_table': get('full.values_for_look_up'),
    'gate': get('swilu_projection.weight').T[:, None],
    'output': get('values_proj.weight').T[None],
  }


OFFICIAL = {
  'v2': (
    _v2_params,
    # The third of four layers that share 400 rows, of which each sees 14 ** 2.
    MemoryConfig.ultramem_v2(
      num_keys=14, key_dim=8, num_selected=6, value_dim=16, pre_value_dim=6,
      query='shared', shared_rows=400,
    ),
    dict(first_row=300),
  ),
  'memplus': (
    _memplus_params,
    MemoryConfig.memory_plus(
      num_keys=12, key_dim=8, num_heads=2, num_selected=6, value_dim=32,
      shared_rows=144, query_bias=False, key_norm='none', replaces_mlp=False,
      placements=((1, 1),),
    ),
    {},
  ),
}  # fmt: skip


def _run_official(case, **options):
  """Output and gradients by name, and what was read."""
  to_params, config, own = OFFICIAL[case]
  arrays = _official(case)
  cotangent = jnp.asarray(arrays['cot'])

  @jax.jit
  def run(params, x):
    def forward(params, x):
      return memory_forward(params, x, config, **own, **options)

    y, vjp, read = jax.vjp(forward, params, x, has_aux=True)
    d_params, d_x = vjp(cotangent)
    return dict(y=y, x=d_x, **d_params), read

  return jax.device_get(run(to_params(arrays), arrays['x']))


def _errors(case, actual):
  """Relative to each array's largest entry."""
  to_params, *_ = OFFICIAL[case]
  arrays = _official(case)
  wanted = dict(y=arrays['y'], x=arrays['gx'], **to_params(arrays, 'grad/'))
  assert wanted.keys() == actual.keys()
  return {
    name: float(np.abs(actual[name] - value).max() / np.abs(value).max())
    for name, value in wanted.items()
  }


def test_equals_the_official_ultramem_v2():
  arrays = _official('v2')
  with jax.enable_x64(True):
    actual, _ = _run_official(
      'v2',
      directions=tuple(
        jnp.asarray(arrays[f'tucker_core_{s}'].reshape(1, 2)) for s in 'uv'
      ),
      permutation=jnp.asarray(arrays['shuffle_index']),
    )
    errors = _errors('v2', actual)
  assert max(errors.values()) <= 1e-10, errors


def _official_weights(slots, weights):
  """The weights [T, P * m] that the official Memory+ must have used.

  Solved for from its output. Of a slot that both heads read only the sum can
  be, which is split as `weights`, the softmax in float64, are.
  """
  arrays = _official('memplus')
  gate = arrays['x'] @ arrays['swilu_projection.weight'].T
  gate = gate / (1 + np.exp(-gate))
  pooled = np.linalg.solve(
    arrays['values_proj.weight'], arrays['y'].reshape(-1, 32).T
  ).T
  pooled /= gate.reshape(-1, 32)
  found = np.empty_like(weights)
  for t, (row, weight) in enumerate(zip(slots, weights, strict=True)):
    distinct, which = np.unique(row, return_inverse=True)
    values = arrays['full.values_for_look_up'][distinct]
    sums = np.linalg.lstsq(values.T, pooled[t])[0]
    found[t] = weight * (sums / np.bincount(which, weight))[which]
  return found


# The official Memory+ takes its softmax in float32, whatever its input. Its
# rounding is in the output, from which the weights are recovered; with them
# all that the table's side computes is exact. The rounding of the softmax's
# gradient is nowhere to be had: what passes through it stays at some 1e-7.
THROUGH_SOFTMAX = ('x', 'query', 'query_scale', 'keys')


def test_equals_the_official_memory_plus(monkeypatch):
  with jax.enable_x64(True):
    options = dict(permutation=jnp.asarray(np.arange(144)))
    _, read = _run_official('memplus', **options)
    softmax = read['weights'][..., 0].reshape(14, 12)
    weights = _official_weights(read['slots'].reshape(14, 12), softmax)
    assert np.abs(weights - softmax).max() < 1e-7
    activate = retrieval._activate

    def with_official_weights(scores, activation):
      weight = activate(scores, activation)
      official = weights.reshape(weight.shape)
      return weight + jax.lax.stop_gradient(official - weight)

    monkeypatch.setattr(retrieval, '_activate', with_official_weights)
    actual, _ = _run_official('memplus', **options)
    errors = _errors('memplus', actual)
  for name, error in errors.items():
    assert error <= (3e-7 if name in THROUGH_SOFTMAX else 1e-10), errors


# Structure.


def _normed(x, kind, gain):
  """Along the last axis."""
  if kind == 'none':
    return x
  if kind == 'layer':
    x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * gain


def _cells(params, x, config):
  """Scores [B, T, P, Q, Q] of all cells, each of the keys met one by one."""
  params, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
  size = config.num_logical_keys
  sides = np.empty((2, *x.shape[:2], config.num_heads, size, config.num_ranks))
  for side, head, rank in np.ndindex(2, config.num_heads, config.num_ranks):
    own = dict(shared=(), per_head=(head,), per_rank=(rank,))[config.query]
    query = x @ params['query'][(slice(None), side, *own)]
    if config.query_bias:
      query += params['query_bias'][(side, *own)]
    keys = params['keys'][0 if config.share_keys else head, side, ..., rank]
    query, keys = (
      _normed(a, kind, params.get(name))
      for a, kind, name in (
        (query, config.query_norm, 'query_scale'),
        (keys, config.key_norm, 'key_scale'),
      )
    )
    sides[side, :, :, head, :, rank] = query @ keys.T
  row, column = sides
  if config.grid == 'additive':
    return row[..., :, None, 0] + column[..., None, :, 0]
  (core,) = params['cores']
  cells = np.empty((*row.shape[:-1], size))
  for i, j in np.ndindex(size, size):
    blocks = core
    if config.cores_per_pairing:
      a, b = (2 * (key // config.num_keys) for key in (i, j))
      blocks = core[:, a : a + 2, b : b + 2]
    cells[..., i, j] = np.einsum(
      'btpr,prs,btps->btp', row[..., i, :], blocks, column[..., j, :]
    )
  return cells


def _weights(cells, config):
  """Weights [B, T, P, Q * Q] of all cells, zero but for the best m."""
  cells = cells.reshape(*cells.shape[:3], -1)
  kept = cells >= np.sort(cells)[..., -config.num_selected, None]
  activation = dict(
    softmax=_softmax,
    sigmoid=lambda x: 1 / (1 + np.exp(-x)),
    relu=lambda x: np.maximum(x, 0),
  )[config.score_activation]
  return np.where(kept, activation(np.where(kept, cells, -np.inf)), 0)


def _softmax(x):
  weights = np.exp(x - x.max(-1, keepdims=True))
  return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize(
  ('query_norm', 'key_norm'),
  [('rms', 'none'), ('layer', 'rms'), ('none', 'layer')],
)
def test_pkm_is_a_softmax_over_the_best_of_all_sums(query_norm, key_norm):
  config = MemoryConfig.pkm(
    num_keys=6, key_dim=4, num_heads=2, num_selected=5, value_dim=8,
    query_norm=query_norm, key_norm=key_norm,
  )  # fmt: skip
  params, x = _params(config, 8), _input()
  assert ('query_scale' in params) == (query_norm != 'none')
  y, _ = _forward(params, x, config, permutation=np.arange(36))
  weights = _weights(_cells(params, x, config), config)
  expected = np.einsum('btpn,nd->btd', weights, params['value_table'])
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('score_activation', 'activation'),
  few(
    [('softmax', 'gelu'), ('sigmoid', 'relu'), ('relu', 'gelu')],
    itertools.product(['softmax', 'sigmoid', 'relu'], ['gelu', 'relu']),
  ),
)
def test_peer_adds_up_one_neuron_experts(score_activation, activation):
  config = MemoryConfig.peer(
    num_keys=6, key_dim=4, num_heads=2, num_selected=5, value_dim=8,
    pre_value_dim=8, score_activation=score_activation,
    pre_value_activation=activation,
  )  # fmt: skip
  params, x = _params(config, 8), _input()
  assert params['keys'].shape[0] == 1
  y, read = _forward(params, x, config, permutation=np.arange(36))
  # Or ReLU would be the identity.
  assert np.any(read['scores'] < 0)
  weights = _weights(_cells(params, x, config), config)
  inner = np.einsum('btd,nd->btn', x, params['pre_value_table'])
  expected = np.einsum(
    'btpn,btn,nd->btd',
    weights,
    jax.jit(getattr(jax.nn, activation))(inner),
    params['value_table'],
  )
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('cores_per_pairing', [False, True])
def test_v2_keeps_the_best_cells_of_all_pairings(cores_per_pairing):
  """Each rank with its query, and each pairing of key sets with its core."""
  config = MemoryConfig.ultramem_v2(
    num_keys=5, key_dim=4, num_selected=10, value_dim=8, pre_value_dim=4,
    num_cores=1, cores_per_pairing=cores_per_pairing,
  )  # fmt: skip
  assert config.query == 'per_rank'
  params, x = _params(config, 8), _input()
  # All ten rows and columns are candidates, so the pre-filter decides nothing.
  _, read = _forward(params, x, config, permutation=np.arange(100))
  cells = _cells(params, x, config).reshape(2, 6, 1, 100)
  best = np.argsort(-cells)[..., :10]
  np.testing.assert_array_equal(read['slots'], best[:, :, 0] % 25)
  np.testing.assert_allclose(
    read['scores'][..., 0],
    np.take_along_axis(cells, best, -1),
    rtol=1e-4,
    atol=1e-5,
  )


def test_v2_with_square_maps_is_peer_without_activation():
  """One core, both maps the identity, scores as they are."""
  sizes = dict(
    num_keys=6, key_dim=4, num_selected=5, value_dim=8, pre_value_dim=8
  )
  config = MemoryConfig.ultramem_v2(num_cores=1, shared_rows=36, **sizes)
  # PEER that scores cells as V2 does, for the same addresses.
  names = ('grid', 'num_cores', 'expansion', 'query', 'key_norm')
  names += ('num_heads', 'share_keys', 'query_bias', 'score_activation')
  same = {name: getattr(config, name) for name in names}
  as_peer = MemoryConfig.peer(pre_value_activation='identity', **same, **sizes)
  params, x = _params(config, 8), _input()
  eye = np.eye(8, dtype=np.float32)
  maps = dict(pre_value_map=eye, output=eye[None])
  assert not maps.keys() & parameters(as_peer, 8, 1).keys()
  y, read = _forward(params | maps, x, config)
  del params['pre_value_map'], params['output']
  expected, peer_read = _forward(params, x, as_peer)
  np.testing.assert_array_equal(read['rows'], peer_read['rows'])
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_tdqkr_with_a_constant_rank_is_pkm():
  """(s, 1) and (1, t) bound by the identity are s + t."""
  rng = np.random.default_rng(0)
  sums = rng.normal(size=(2, 5, 2, 7)).astype(np.float32)

  @jax.jit
  def run(row, column):
    one = jnp.ones_like(row)
    by_core = tucker_top_m(
      jnp.stack([row, one], -1),
      jnp.stack([one, column], -1),
      jnp.broadcast_to(jnp.eye(2), (1, 2, 2, 2)),
      4,
      directions=tuple(
        jnp.broadcast_to(jnp.asarray(v, jnp.float32), (2, 2))
        for v in ([1, 0], [0, 1])
      ),
    )
    return *by_core, *product_key_top_m(row, column, 4)

  scores, address, expected, same = jax.device_get(run(*sums))
  np.testing.assert_allclose(scores[..., 0], expected, rtol=1e-6)
  np.testing.assert_array_equal(np.sort(address), np.sort(same))


def test_windows_go_around_the_end_of_the_shared_table():
  """A layer sees rows of its window only, each by one slot."""
  config = MemoryConfig.ultramem_v2(
    num_keys=6, key_dim=4, num_selected=5, value_dim=8, pre_value_dim=4,
    shared_rows=50,
  )  # fmt: skip
  params, x = _params(config, 8), _input()
  for first_row in (0, 30):
    _, read = _forward(params, x, config, first_row=first_row)
    window = (first_row + np.arange(36)) % 50
    assert set(np.unique(read['rows'])) <= set(window)
    np.testing.assert_array_equal(
      read['rows'], (first_row + read['slots']) % 50
    )


def test_blocks_read_windows_of_their_own():
  """Of a table for all, which two windows of half of it share out."""
  memory = MemoryConfig.ultramem_v2(
    num_keys=6, key_dim=4, num_selected=5, value_dim=8, pre_value_dim=4,
    shared_rows=2 * 36, placements=((0, 0), (1, 1)),
  )  # fmt: skip
  model = Transformer(
    ModelConfig(
      num_layers=2, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4,
      mlp_dim=8, vocab_size=11, memory=memory,
    )
  )  # fmt: skip
  tokens = np.arange(12, dtype=np.int32).reshape(2, 6) % 11
  inputs = tuple(map(jnp.asarray, (tokens, tokens, np.ones_like(tokens))))
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: rng.normal(size=a.shape).astype(a.dtype),
    jax.eval_shape(model.init, jax.random.key(0), *inputs)['params'],
  )

  @jax.jit
  def run(params):
    _, sown = model.apply(
      {'params': params},
      *inputs,
      capture_intermediates=lambda module, _: isinstance(module, MemoryLayer),
    )
    blocks = sown['intermediates']
    return [blocks[f'block_0{i}']['memory']['__call__'][0][0] for i in (0, 1)]

  both = run(params)
  for i in (0, 1):
    is_own = np.arange(72)[:, None] // 36 == i
    tables = {name: x * is_own for name, x in params['memory'].items()}
    outputs = run(params | dict(memory=tables))
    assert not np.any(outputs[1 - i])
    assert np.all(np.any(outputs[i] != 0, axis=-1))
    if i == 0:
      np.testing.assert_array_equal(outputs[0], both[0])


def test_memory_plus_normalises_keys():
  """Gains of keys get a gradient, and their length decides nothing."""
  config = MemoryConfig.memory_plus(
    num_keys=6, key_dim=4, num_heads=2, num_selected=5, value_dim=8
  )
  params, x = _params(config, 8), _input()

  @jax.jit
  def run(params, x):
    def loss(params):
      y, _ = memory_forward(params, x, config)
      return jnp.sum(y**2), y

    return jax.grad(loss, has_aux=True)(params)

  gradient, y = run(params, x)
  _, longer = run(params | dict(keys=3 * params['keys']), x)
  np.testing.assert_allclose(longer, y, rtol=1e-3, atol=1e-4)
  assert np.abs(gradient['key_scale']).max() > 0


# Initial values.


def test_matched_init_follows_equation_26():
  config = MemoryConfig.ultramem_v2(
    num_keys=1138, key_dim=192, num_selected=32, value_dim=192,
    pre_value_dim=192,
  )  # fmt: skip
  # The paper's MLP: both halves together 4,992 wide, 20 blocks; its 0.0676 has
  # no spread that we know of in it.
  variance = 0.064 * 4992 / 2 / 768 / (2 * 20)
  scale = matched_value_scale(config, 768, variance, 0.0)
  np.testing.assert_allclose(scale, 0.0676, rtol=0.01)
  scales = initial_scales(config, 768, 20)
  np.testing.assert_allclose(scales.output, 0.02282177, rtol=1e-6)
  np.testing.assert_allclose(scales.pre_value_map, 0.02282177, rtol=1e-6)


def _drawn(config, model_dim, num_layers, **rows):
  """Initial values, the tables with as many rows as are given."""

  @jax.jit
  def draw(key):
    keys = iter(jax.random.split(key, 16))
    return {
      name: init(next(keys), (rows.get(name, shape[0]), *shape[1:]))
      for name, (init, _, shape) in parameters(
        config, model_dim, num_layers
      ).items()
    }

  return draw(jax.random.key(0))


def _over_cores(config, params, x, **options):
  """Outputs and scores for 24 draws of the cores.

  They are all that does not average out within a layer: one draw differs from
  the mean by a third or so.
  """
  high = initial_scales(config, x.shape[-1], 1).cores
  shape = (24, *params['cores'].shape)
  rng = np.random.default_rng(2)
  cores = (high * rng.uniform(size=shape)).astype(np.float32)
  found = [
    _forward(params | dict(cores=core), x, config, **options) for core in cores
  ]
  ys, reads = zip(*found, strict=True)
  return np.stack(ys), np.stack([read['scores'] for read in reads])


def test_matched_init_writes_what_the_mlp_writes():
  config = MemoryConfig.ultramem_v2(
    num_keys=64, key_dim=32, num_selected=16, value_dim=48, pre_value_dim=48
  )
  x = _input((2, 64, 96))
  ys, scores = _over_cores(config, _drawn(config, 96, 6), x)
  mlp = MLP(256, num_layers=6)
  mlp_y = jax.jit(lambda x: mlp.init_with_output(jax.random.key(3), x)[0][0])(x)
  assert ys.var() / mlp_y.var() == pytest.approx(1, abs=0.2)
  assert scores.mean() == pytest.approx(1, abs=0.15)
  assert scores.std() == pytest.approx(_SCORE_SPREAD, abs=0.07)


def test_release_init_gives_the_measured_scores():
  """The reference gives the numbers of one draw, whose cores are not known.

  They scale the scores, so the cores are drawn until their singular value is
  what the scores' mean asks for.
  """
  config = MemoryConfig.ultramem_v2(
    num_keys=1138, key_dim=192, num_selected=32, value_dim=192,
    pre_value_dim=192, expansion=1, query='shared', init='release',
  )  # fmt: skip
  x = _input((1, 48, 768))
  # Rows are alike, so few of them do.
  rows = dict.fromkeys(('value_table', 'pre_value_table'), 2**12)
  params = _drawn(config, 768, 20, **rows)
  rng = np.random.default_rng(4)
  cores = rng.uniform(size=(100, 2, 1, 2, 2)).astype(np.float32)
  leading = np.linalg.svd(cores.sum(1), compute_uv=False)[:, 0, 0]
  draw = np.argmin(np.abs(leading - 1.42))
  y, read = _forward(
    params | dict(cores=cores[draw]),
    x,
    config,
    permutation=np.arange(1138**2) % 2**12,
  )
  scores = read['scores']
  size = math.sqrt((scores**2).mean())
  np.testing.assert_allclose(scores.mean(), 0.266, rtol=0.05)
  # Scores spread by how much the two cores differ: 0.10 in that draw.
  np.testing.assert_allclose(
    y.std() / size, 0.0090 / math.hypot(0.266, 0.10), rtol=0.05
  )
  formula = math.sqrt(0.02**4 * 192 * 32) * size
  np.testing.assert_allclose(y.std(), formula, rtol=0.05)


# Devices.

FAMILY = {
  'pkm': MemoryConfig.pkm(num_keys=8, key_dim=4, num_selected=4, value_dim=16),
  'peer': MemoryConfig.peer(
    num_keys=8, key_dim=4, num_selected=4, value_dim=16, pre_value_dim=16
  ),
  'memory_plus': MemoryConfig.memory_plus(
    num_keys=8, key_dim=4, num_selected=4, value_dim=16, shared_rows=64
  ),
  'ultramem_v2': MemoryConfig.ultramem_v2(
    num_keys=8, key_dim=4, num_selected=4, value_dim=16, pre_value_dim=8,
    shared_rows=80, cores_per_pairing=True,
  ),
}  # fmt: skip


# The others in the slow lane: tests of the train step and of guests cut rows.
IN_DEFAULT_LANE = (('ultramem_v2', 'columns'),)


@pytest.mark.parametrize(
  ('name', 'scheme', 'shape'),
  [
    pytest.param(
      name,
      scheme,
      (2, 4, 1) if name == 'peer' and scheme == 'rows' else (2, 2, 2),
      marks=() if (name, scheme) in IN_DEFAULT_LANE else pytest.mark.slow,
    )
    for name, scheme in itertools.product(FAMILY, ('rows', 'columns', 'grid'))
  ]
  + [pytest.param('ultramem_v2', 'grid', (4, 2, 1), marks=pytest.mark.slow)],
)
def test_sharded_equals_unsharded(name, scheme, shape):
  config = dataclasses.replace(FAMILY[name], table=TableConfig(scheme=scheme))
  params, x = _params(config, 16), _input((8, 3, 16))

  def loss(params, x):
    y, metrics = MemoryLayer(
      config, first_row=20 if config.shared_rows > 64 else 0
    ).apply({'params': params}, x)
    return jnp.sum(jnp.sin(y)) + metrics['aux_loss']

  expected = jax.jit(jax.value_and_grad(loss, (0, 1)))(params, x)
  with jax.set_mesh(mesh_lib.make_mesh(*shape)):
    declared = parameters(config, 16, 1, scheme)
    sharded = {
      key: jax.device_put(value, declared[key][1])
      for key, value in params.items()
    }
    actual = jax.jit(jax.value_and_grad(loss, (0, 1)))(
      sharded, jax.device_put(x, mesh_lib.act('BTD'))
    )
  for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


# Errors.


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(grid='additive', split_key_dim=True), 'split_key_dim needs grid'),
    (dict(gate=True, output_map=False), r'gate needs .* MemoryConfig\.memory_'),
    (dict(shared_rows=3), 'shared_rows must be 0 or at least'),
    (dict(init='matched'), "init = 'matched' is UltraMemV2's rule"),
    (dict(replaces_mlp=True), 'replaces_mlp needs placements that write'),
    (dict(query='per_rank', split_key_dim=True), 'split_key_dim needs a query'),
    (dict(query='shared', share_keys=True), 'share_keys needs query'),
  ],
)
def test_bad_combinations(fields, message):
  with pytest.raises(UserError, match=message):
    MemoryConfig(**fields)


def test_widths_that_must_be_the_models():
  with pytest.raises(
    UserError, match='value_dim must be 0 or the model width 8'
  ):
    parameters(MemoryConfig.pkm(value_dim=6), 8, 1)
  with pytest.raises(UserError, match='pre_value_dim must be 0 or the'):
    parameters(MemoryConfig.peer(value_dim=8, pre_value_dim=6), 8, 1)
