"""PKM, PEER, Memory+ and UltraMemV2 against the official layers and oracles."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import mesh as mesh_lib
from jaxsparse.errors import UserError
from jaxsparse.memory_config import (
  MemoryConfig,
  memory_plus,
  peer,
  pkm,
  ultramem_v2,
)
from jaxsparse.nn.memory import MemoryLayer, memory_forward
from jaxsparse.nn.memory_init import (
  _MLP_VARIANCE,
  matched_value_scale,
  parameters,
)
from jaxsparse.ops.product_key import product_key_top_m
from jaxsparse.ops.tucker import tucker_top_m

FIXTURE = pathlib.Path(__file__).parents[1] / 'fixtures/memory_family.npz'


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
    name: jnp.asarray(rng.normal(0.3, 0.5, size), jnp.float32)
    for name, (_, _, size) in declared.items()
  }


def _input(shape=(2, 6, 8), seed=1):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), 'float32')


@functools.partial(
  jax.jit, static_argnames=('config', 'salt', 'first_row', 'num_rows')
)
def _forward(params, x, config, **options):
  return memory_forward(params, x, config, **options)


# The official layers.


def _v2_params(arrays, prefix=''):
  get = lambda name: jnp.asarray(arrays[prefix + name])  # noqa: E731
  return {
    # Half of the official query map is for other ranks and never used.
    'query': get('query_proj.weight')[:16].T.reshape(32, 2, 8),
    'query_scale': get('query_norm.weight'),
    'keys': get('keys'),
    'key_scale': get('keys_norm.weight'),
    'cores': jnp.stack([get(f'tucker_core.{i}') for i in range(2)]),
    'value_table': get('full.values_for_look_up'),
    'pre_value_table': get('full.pre_values_for_look_up'),
    'pre_value_map': get('pre_values_proj.weight').T,
    'output': get('values_proj.weight').T[None],
  }


def _memplus_params(arrays, prefix=''):
  get = lambda name: jnp.asarray(arrays[prefix + name])  # noqa: E731
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
    ultramem_v2(
      num_keys=14, key_dim=8, num_selected=6, value_dim=16, pre_value_dim=6,
      query='shared', shared_rows=400,
    ),
    dict(first_row=300),
  ),
  'memplus': (
    _memplus_params,
    memory_plus(
      num_keys=12, key_dim=8, num_heads=2, num_selected=6, value_dim=32,
      shared_rows=144, query_bias=False, key_norm='none', replaces_mlp=False,
      placements=((1, 1),),
    ),
    {},
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', OFFICIAL)
def test_equals_the_official_layer(case):
  to_params, config, options = OFFICIAL[case]
  arrays = _official(case)
  with jax.enable_x64(True):
    if case == 'v2':
      options = options | dict(
        directions=tuple(
          jnp.asarray(arrays[f'tucker_core_{s}']).reshape(1, 2) for s in 'uv'
        ),
        permutation=jnp.asarray(arrays['shuffle_index']),
      )
    else:
      options = dict(permutation=jnp.arange(144))
    cotangent = jnp.asarray(arrays['cot'])

    @jax.jit
    def run(params, x):
      def forward(params, x):
        return memory_forward(params, x, config, **options)[0]

      y, vjp = jax.vjp(forward, params, x)
      return y, *vjp(cotangent)

    y, d_params, d_x = run(to_params(arrays), jnp.asarray(arrays['x']))
    wanted = dict(y=arrays['y'], x=arrays['gx'], **to_params(arrays, 'grad/'))
    for name, actual in dict(y=y, x=d_x, **d_params).items():
      error = np.abs(actual - wanted[name]).max()
      # The official Memory+ takes its softmax in float32, whatever its input:
      # with torch's own rounding of it in an oracle the difference is 1e-16.
      tolerance = 1e-10 if case == 'v2' else 1e-6
      assert error <= tolerance * np.abs(wanted[name]).max(), (name, error)


# Structure.


def test_pkm_is_a_softmax_over_the_best_of_all_sums():
  config = pkm(num_keys=6, key_dim=4, num_heads=2, num_selected=5, value_dim=8)
  params, x = _params(config, 8), _input()
  address = jnp.arange(36)
  y, _ = _forward(params, x, config, permutation=address)
  query = jnp.einsum('btd,dspk->btspk', x, params['query'])
  query += params['query_bias'][None, None]
  square = jnp.mean(query**2, axis=-1, keepdims=True)
  query = query / jnp.sqrt(square + 1e-5)
  query *= params['query_scale'][None, None, None, None]
  row, column = (
    jnp.einsum('btpk,pqk->btpq', query[:, :, s], params['keys'][:, s, :, :, 0])
    for s in range(2)
  )
  sums = (row[..., :, None] + column[..., None, :]).reshape(2, 6, 2, 36)
  kept = sums >= jnp.sort(sums, axis=-1)[..., -5:-4]
  weights = jax.nn.softmax(jnp.where(kept, sums, -jnp.inf), axis=-1)
  expected = jnp.einsum('btpn,nd->btd', weights, params['value_table'])
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_peer_adds_up_one_neuron_experts():
  config = peer(
    num_keys=6, key_dim=4, num_heads=2, num_selected=5, value_dim=8,
    pre_value_dim=8, score_activation='sigmoid',
  )  # fmt: skip
  params, x = _params(config, 8), _input()
  assert params['keys'].shape[0] == 1
  y, read = _forward(params, x, config, permutation=jnp.arange(36))
  rows = read['rows']
  inner = jnp.einsum('btd,btkd->btk', x, params['pre_value_table'][rows])
  weights = jax.nn.sigmoid(read['scores'].reshape(2, 6, 10))
  expected = jnp.einsum(
    'btk,btkd->btd',
    weights * jax.nn.gelu(inner),
    params['value_table'][rows],
  )
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_v2_with_square_maps_is_peer_without_activation():
  """One core, both maps the identity, scores as they are."""
  config = ultramem_v2(
    num_keys=6, key_dim=4, num_selected=5, value_dim=8, pre_value_dim=8,
    num_cores=1, shared_rows=36,
  )  # fmt: skip
  params, x = _params(config, 8), _input()
  maps = dict(pre_value_map=jnp.eye(8), output=jnp.eye(8)[None])
  y, read = _forward(params | maps, x, config)
  rows, scores = read['rows'], read['scores'].reshape(2, 6, 5)
  inner = jnp.einsum('btd,btkd->btk', x, params['pre_value_table'][rows])
  expected = jnp.einsum(
    'btk,btkd->btd', scores * inner, params['value_table'][rows]
  )
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_tdqkr_with_a_constant_rank_is_pkm():
  """(s, 1) and (1, t) bound by the identity are s + t."""
  rng = np.random.default_rng(0)
  row, column = jnp.asarray(rng.normal(size=(2, 5, 2, 7)), jnp.float32)
  one = jnp.ones_like(row)
  scores, address = tucker_top_m(
    jnp.stack([row, one], -1),
    jnp.stack([one, column], -1),
    jnp.broadcast_to(jnp.eye(2), (1, 2, 2, 2)),
    4,
    directions=tuple(
      jnp.broadcast_to(jnp.asarray(v, jnp.float32), (2, 2))
      for v in ([1, 0], [0, 1])
    ),
  )
  expected, same = product_key_top_m(row, column, 4)
  np.testing.assert_allclose(scores[..., 0], expected, rtol=1e-6)
  np.testing.assert_array_equal(np.sort(address), np.sort(same))


def test_windows_go_around_the_end_of_the_shared_table():
  """A layer sees rows of its window only, each by one slot."""
  config = ultramem_v2(
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


def test_a_core_for_each_pairing_of_key_sets():
  """Scores are those of the pairing's own core; equal cores are one core."""
  sizes = dict(
    num_keys=5, key_dim=4, num_selected=10, value_dim=8, pre_value_dim=4,
    num_cores=1,
  )  # fmt: skip
  one, many = ultramem_v2(**sizes), ultramem_v2(**sizes, cores_per_pairing=True)
  params, x = _params(one, 8), _input()
  core = jnp.abs(params['cores'])
  y, read = _forward(params | dict(cores=core), x, one)
  same = jnp.tile(core, (1, 1, 2, 2))
  y_same, read_same = _forward(params | dict(cores=same), x, many)
  # All ten rows and columns are candidates, so the pre-filter decides nothing.
  np.testing.assert_allclose(y_same, y, rtol=2e-5, atol=1e-5)
  np.testing.assert_allclose(
    read_same['scores'], read['scores'], rtol=1e-5, atol=1e-6
  )
  other = same.at[:, :, 2:, :2].multiply(0.5)
  identity = jnp.arange(100)
  _, read = _forward(params | dict(cores=other), x, many, permutation=identity)
  _, plain = _forward(params | dict(cores=core), x, one, permutation=identity)
  address = read['slots'] + 25 * 0
  assert address.shape == plain['slots'].shape
  assert not np.allclose(read['scores'], plain['scores'])


def test_memory_plus_normalises_keys():
  """Gains of keys get a gradient, and their length decides nothing."""
  config = memory_plus(
    num_keys=6, key_dim=4, num_heads=2, num_selected=5, value_dim=8
  )
  params, x = _params(config, 8), _input()
  y, _ = _forward(params, x, config)
  longer, _ = _forward(params | dict(keys=3 * params['keys']), x, config)
  np.testing.assert_allclose(longer, y, rtol=1e-3, atol=1e-4)
  gradient = jax.grad(lambda p: jnp.sum(memory_forward(p, x, config)[0] ** 2))(
    params
  )
  assert np.abs(gradient['key_scale']).max() > 0


# Initial values.


def test_matched_init_follows_equation_26():
  config = ultramem_v2(
    num_keys=1138, key_dim=192, num_selected=32, value_dim=192,
    pre_value_dim=192,
  )  # fmt: skip
  # The paper's MLP: both halves together 4,992 wide, 20 blocks; its 0.0676 has
  # no spread that we know of in it.
  variance = 0.064 * 4992 / 2 / 768 / (2 * 20)
  scale = matched_value_scale(config, 768, variance, 0.0)
  np.testing.assert_allclose(scale, 0.0676, rtol=0.01)


def test_matched_init_writes_what_the_mlp_writes():
  config = ultramem_v2(
    num_keys=64, key_dim=32, num_selected=16, value_dim=48, pre_value_dim=48
  )
  x = jax.random.normal(jax.random.key(1), (4, 64, 96))
  ratios = []
  for seed in range(3):
    layer = MemoryLayer(config, 6)
    params = jax.jit(layer.init)(jax.random.key(seed), x)
    y, metrics = jax.jit(layer.apply)(params, x)
    ratios.append(float(jnp.var(y)) / (_MLP_VARIANCE / 12))
    assert 0.6 < metrics['score_mean'] < 1.5
  # One draw of the two cores differs from the mean by a third or so.
  assert 0.5 < np.mean(ratios) < 2


# Devices.

FAMILY = {
  'pkm': pkm(num_keys=8, key_dim=4, num_selected=4, value_dim=16),
  'peer': peer(
    num_keys=8, key_dim=4, num_selected=4, value_dim=16, pre_value_dim=16
  ),
  'memory_plus': memory_plus(
    num_keys=8, key_dim=4, num_selected=4, value_dim=16, shared_rows=64
  ),
  'ultramem_v2': ultramem_v2(
    num_keys=8, key_dim=4, num_selected=4, value_dim=16, pre_value_dim=8,
    shared_rows=80, cores_per_pairing=True,
  ),
}  # fmt: skip


@pytest.mark.parametrize(
  ('name', 'scheme', 'shape'),
  [
    pytest.param('pkm', 'columns', (2, 2, 2), marks=pytest.mark.slow),
    ('peer', 'rows', (2, 4, 1)),
    ('memory_plus', 'grid', (2, 2, 2)),
    ('ultramem_v2', 'rows', (2, 2, 2)),
    ('ultramem_v2', 'columns', (2, 2, 2)),
    pytest.param('ultramem_v2', 'grid', (4, 2, 1), marks=pytest.mark.slow),
  ],
)
def test_sharded_equals_unsharded(name, scheme, shape):
  config = dataclasses.replace(FAMILY[name], scheme=scheme)
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
    (dict(gate=True, output_map=False), 'gate needs output_map'),
    (dict(shared_rows=3), 'shared_rows must be 0 or at least'),
    (dict(init='matched'), "init = 'matched' is UltraMemV2's rule"),
    (dict(replaces_mlp=True), 'replaces_mlp needs placements that write'),
    (dict(query='per_rank', split_key_dim=True), 'split_key_dim needs a query'),
  ],
)
def test_bad_combinations(fields, message):
  with pytest.raises(UserError, match=message):
    MemoryConfig(**fields)


def test_widths_that_must_be_the_models():
  with pytest.raises(UserError, match='value_dim must be the model width 8'):
    parameters(pkm(value_dim=6), 8, 1)
  with pytest.raises(UserError, match='pre_value_dim must be the model width'):
    parameters(peer(value_dim=8, pre_value_dim=6), 8, 1)
