# SPDX-License-Identifier: Apache-2.0
import functools
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from lanes import few

from jaxsparse import mesh as mesh_lib
from jaxsparse.config import MemoryConfig, TableConfig
from jaxsparse.nn.memory.init import (
  expected_cell_mean,
  expected_top_mean,
  initial_scales,
  parameters,
)
from jaxsparse.nn.memory.layer import MemoryLayer, memory_forward
from jaxsparse.ops.memory import addressing, usage
from jaxsparse.ops.memory.tucker import tucker_top_m

FIXTURE = pathlib.Path(__file__).parents[2] / 'fixtures' / 'ultramem_v1.npz'


def _config(**overrides):
  sizes = dict(num_keys=8, key_dim=4, num_heads=2, num_selected=4, value_dim=6)
  return MemoryConfig(**(sizes | overrides))


def _init(config, shape=(2, 6, 8)):
  """Parameters of order one, from NumPy: a compiled draw takes seconds."""
  rng = np.random.default_rng(0)
  params = {
    name: rng.normal(0.5, 0.5, size).astype(np.float32)
    for name, (_, _, size) in parameters(config, shape[-1], 1).items()
  }
  return params, rng.normal(size=shape).astype(np.float32)


def _draw(config, x, num_layers):
  init = jax.jit(MemoryLayer(config, num_layers).init)
  return init(jax.random.key(0), x)['params']


# Compiled once for each config and set of shapes. What they return goes to
# NumPy: JAX compiles every operation of its arrays outside of jit.
@functools.partial(jax.jit, static_argnames=('config', 'salt'))
def _compiled_forward(params, x, config, **options):
  return memory_forward(params, x, config, **options)


def _forward(params, x, config, **options):
  return jax.device_get(_compiled_forward(params, x, config, **options))


@functools.partial(jax.jit, static_argnames=('config',))
def _compiled_apply(params, x, args, config):
  return MemoryLayer(config).apply({'params': params}, x, *args)


def _apply(params, x, *args, config):
  return jax.device_get(_compiled_apply(params, x, args, config))


# The official layer.


def _official(case):
  arrays = np.load(FIXTURE)
  return {
    name.removeprefix(f'{case}/'): arrays[name]
    for name in arrays.files
    if name.startswith(f'{case}/')
  }


def _to_params(arrays, config, prefix=''):
  """Official names and layouts to ours; the same map holds for gradients."""
  get = lambda name: arrays[prefix + name]  # noqa: E731
  dim = arrays['x'].shape[-1]
  return {
    'query': get('query_proj.weight').T.reshape(dim, 2, config.key_dim),
    'query_scale': get('query_norm.weight'),
    'keys': get('keys'),
    'key_scale': get('keys_norm.weight'),
    'cores': np.stack([get(f'tucker_core.{i}') for i in range(2)]),
    'value_table': get('values_for_look_up'),
    'output': get('values_proj.weight').T.reshape(
      config.expansion, config.value_dim, dim
    ),
  }


@pytest.mark.parametrize(
  'case', few(['v1_H2_E4'], ['v1_H2_E4', 'v1_H2_E1', 'v1_H1_E4'])
)
def test_equals_the_official_layer(case):
  arrays = _official(case)
  num_heads, expansion = int(case[4]), int(case[7])
  config = MemoryConfig(
    num_keys=12, key_dim=8, num_heads=num_heads, num_selected=6, value_dim=16,
    expansion=expansion, tucker_rank=2, num_cores=2,
  )  # fmt: skip
  with jax.enable_x64(True):
    params = _to_params(arrays, config)
    directions = tuple(
      jnp.asarray(arrays[f'tucker_core_{s}'].reshape(num_heads, 2))
      for s in 'uv'
    )
    permutation = jnp.asarray(arrays['shuffle_index'])
    cotangent = jnp.asarray(arrays['cot'])

    @jax.jit
    def run(params, x):
      def forward(params, x):
        return memory_forward(
          params, x, config, directions=directions, permutation=permutation
        )[0]

      y, vjp = jax.vjp(forward, params, x)
      return y, *vjp(cotangent)

    y, d_params, d_x = run(params, arrays['x'])
    wanted = dict(
      y=arrays['y'], x=arrays['gx'], **_to_params(arrays, config, 'grad/')
    )
    for name, actual in dict(y=y, x=d_x, **d_params).items():
      error = np.abs(actual - wanted[name]).max()
      assert error <= 1e-10 * np.abs(wanted[name]).max(), (name, error)
  assert jnp.asarray(1.0).dtype == jnp.float32


# Structure.


def test_pooling_per_block_equals_an_expanded_table():
  """Pool then project is a lookup in [V W_1; ...; V W_E] by virtual address."""
  config = _config()
  params, x = _init(config)
  address = np.arange(config.num_logical_keys**2)
  y, read = _forward(params, x, config, permutation=address)
  values = params['value_table'].reshape(64, 2, 3)
  output = params['output'].reshape(4, 2, 3, 8)
  expanded = np.einsum('mcw,ecwd->emcd', values, output).reshape(-1, 2, 8)
  # The same keys on a table that needs no expansion: slots are addresses.
  whole = dict(
    value_table=np.zeros((256, 6), np.float32),
    output=np.zeros((1, 6, 8), np.float32),
  )
  _, read_whole = _forward(
    params | whole,
    x,
    _config(num_keys=16, expansion=1),
    permutation=address,
  )
  scores = read['scores'].reshape(2, 6, 8, 2)
  expected = np.einsum('btkc,btkcd->btd', scores, expanded[read_whole['slots']])
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_table_and_arithmetic_forms_of_a_bijection_agree():
  config = _config()
  params, x = _init(config)
  shuffle = jax.jit(addressing.shuffle, static_argnums=(1, 2))
  table = shuffle(np.arange(256), config.num_logical_keys, 0)
  by_table = _forward(params, x, config, permutation=table)
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, atol=1e-6),
    by_table,
    _forward(params, x, config),
  )
  y, read = _forward(params, x, config, salt=1)
  assert not np.array_equal(read['slots'], by_table[1]['slots'])
  assert not np.allclose(y, by_table[0])


def test_without_expansion_it_is_a_plain_bag_and_a_matrix():
  config = _config(expansion=1, num_cores=1)
  params, x = _init(config)
  y, read = _forward(params, x, config, permutation=np.arange(64))
  rows = params['value_table'][read['slots']]
  scores = read['scores'].reshape(2, 6, 8)
  expected = np.einsum('btk,btkw,wd->btd', scores, rows, params['output'][0])
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_each_core_weights_its_own_columns():
  config = _config()
  params, x = _init(config)
  y, read = _forward(params, x, config)
  # Moving half of core 1 to core 0 keeps the sum, and with it the slots.
  moved = params['cores'][1] / 2
  cores = np.stack([params['cores'][0] + moved, moved])
  y_moved, read_moved = _forward(params | {'cores': cores}, x, config)
  np.testing.assert_array_equal(
    np.sort(read['slots']), np.sort(read_moved['slots'])
  )
  # Each block of columns followed its own core: block 1 now gives one half.
  is_first = (np.arange(6) < 3)[:, None]
  first = np.where(is_first, params['output'], 0)
  second = np.where(is_first, 0, params['output'])
  y_first, _ = _forward(params | {'output': first}, x, config)
  y_second, _ = _forward(params | {'output': second}, x, config)
  np.testing.assert_allclose(y, y_first + y_second, rtol=1e-5)
  y_second_moved, _ = _forward(
    params | {'output': second, 'cores': cores}, x, config
  )
  np.testing.assert_allclose(y_second_moved, y_second / 2, rtol=1e-5)
  assert not np.allclose(y_moved, y)


@pytest.mark.parametrize('rank', few([4], [2, 4]))
def test_split_keys_meet_slices_of_the_query(rank):
  config = _config(split_key_dim=True, tucker_rank=rank)
  params, x = _init(config)
  width = 4 // rank
  assert params['keys'].shape == (2, 2, 16, width, rank)

  def normed(x, scale, axis):
    return x / np.sqrt(np.mean(x**2, axis, keepdims=True) + 1e-5) * scale

  query = normed(
    np.einsum('btd,dsk->btsk', x, params['query']),
    params['query_scale'],
    -1,
  )
  gain = params['key_scale'][:, None]
  keys = normed(params['keys'], gain, -2)
  row, column = (
    np.stack(
      [
        np.einsum(
          'btk,pqk->btpq',
          query[:, :, s, a * width : (a + 1) * width],
          keys[:, s, :, :, a],
        )
        for a in range(rank)
      ],
      axis=-1,
    ).reshape(12, 2, 16, rank)
    for s in range(2)
  )
  best = jax.jit(tucker_top_m, static_argnums=3)
  expected, _ = best(row, column, params['cores'], 4)
  _, read = _forward(params, x, config)
  np.testing.assert_allclose(
    read['scores'].reshape(expected.shape), expected, rtol=1e-4, atol=1e-5
  )


def test_two_quadrants_are_another_model():
  params, x = _init(_config())
  y, _ = _forward(params, x, _config())
  y_two, read = _forward(params, x, _config(use_two_quadrants=True))
  assert read['slots'].shape == (2, 6, 8)
  assert not np.allclose(y, y_two)


# Time.


@pytest.mark.parametrize('taps', [0, 3])
def test_is_causal(taps):
  config = _config(query_conv_taps=taps)
  params, x = _init(config)
  y, _ = _forward(params, x, config)
  now = np.float32(np.arange(6) == 3)[:, None]
  y_changed, _ = _forward(params, x + now, config)
  np.testing.assert_allclose(y_changed[:, :3], y[:, :3], atol=1e-6)
  is_changed = np.any(np.abs(y_changed - y) > 1e-5, axis=(0, 2))
  assert is_changed[3]
  assert is_changed[4] == (taps > 1)


def test_convolution_stops_at_documents():
  config = _config(query_conv_taps=3)
  params, x = _init(config)
  segments = np.array([[1, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1]])
  y, _ = _forward(params, x, config, segment_ids=segments)
  # What comes after decides nothing.
  first, _ = _forward(params, np.roll(x, 3, axis=1), config)
  np.testing.assert_allclose(y[:, 3:], first[:, :3], rtol=1e-5, atol=1e-6)
  without, _ = _forward(params, x, config)
  assert not np.allclose(without[0, 3], y[0, 3])


@pytest.mark.parametrize('taps', few([3], [1, 3]))
def test_decoding_with_a_context_equals_the_full_pass(taps):
  config = _config(query_conv_taps=taps)
  params, x = _init(config)
  segments = np.array([[1, 1, 1, 1, 2, 2], [0, 0, 0, 1, 1, 1]], np.int32)
  full, _ = _apply(params, x, segments, config=config)
  context = (
    np.zeros((2, taps - 1, 8), np.float32),
    np.zeros((2, taps - 1), np.int32),
  )
  for t in range(6):
    now = (x[:, t : t + 1], segments[:, t : t + 1])
    y, _ = _apply(params, *now, context, config=config)
    np.testing.assert_allclose(y, full[:, t : t + 1], rtol=1e-5, atol=1e-6)
    context = tuple(
      np.concatenate([old, new], axis=1)[:, 1:]
      for old, new in zip(context, now, strict=True)
    )


# Initial scales.


@pytest.mark.parametrize(
  ('n', 'm', 'expected'),
  [(1616, 80, 2.06), (1138, 32, 2.28), (1056, 128, 1.66), (2000, 42, 2.39)],
)
def test_expected_top_mean(n, m, expected):
  assert abs(expected_top_mean(n, m) - expected) < 0.01


def test_expected_means_of_all_and_of_one():
  assert abs(expected_top_mean(7, 7)) < 1e-12
  # The larger of two normals: 1 / sqrt(pi).
  assert abs(expected_top_mean(2, 1) - math.pi**-0.5) < 1e-12
  assert abs(expected_cell_mean(2, 1) - 1 / math.pi) < 1e-12


def test_a_memory_may_have_a_single_slot():
  config = MemoryConfig(
    num_keys=1, expansion=1, num_selected=1, key_dim=4, value_dim=4
  )
  init = jax.jit(MemoryLayer(config).init_with_output)
  y, _ = init(jax.random.key(0), np.ones((1, 2, 8), np.float32))[0]
  assert np.isfinite(y).all()
  assert np.abs(y).max() > 0


def test_release_init_gives_the_measured_scores():
  """A width of 8 instead of 384: the statistics do not depend on it.

  The reference gives the numbers of one draw, whose cores are not known. They
  scale the scores, so the cores are drawn until their singular values agree.
  """
  config = _config(
    num_keys=808, key_dim=192, num_selected=80, value_dim=8, init='release'
  )
  rng = np.random.default_rng(1)
  x = rng.normal(size=(1, 48, 768)).astype(np.float32)
  params = _draw(config, x, 20)
  cores = rng.uniform(size=(100, 2, 2, 2, 2)).astype(np.float32)
  leading = np.linalg.svd(cores.sum(1), compute_uv=False)[..., 0]
  draw = np.argmin(np.abs(leading - 1.82).sum(-1))
  y, read = _forward(params | {'cores': cores[draw]}, x, config)
  scores = read['scores']
  best = scores.mean(-1)
  measured = np.array(
    [y.std(), scores.mean(), best[..., 0].mean(), best[..., -1].mean()]
  )
  np.testing.assert_allclose(measured, [0.188, 1.42, 1.90, 1.28], rtol=0.05)
  formula = math.sqrt(160 * 0.02**2 * (scores**2).mean() / 4)
  np.testing.assert_allclose(y.std(), formula, rtol=0.03)


@pytest.mark.parametrize(
  'sizes',
  [
    pytest.param(
      dict(num_keys=64, key_dim=64, num_selected=16, value_dim=32),
      marks=pytest.mark.slow,
    ),
    dict(
      num_keys=96, key_dim=64, num_selected=32, value_dim=32, expansion=1,
      split_key_dim=True, num_cores=1,
    ),
  ],
)  # fmt: skip
def test_paper_init_gives_unit_scores(sizes):
  config, num_layers = _config(**sizes), 12
  rng = np.random.default_rng(1)
  x = rng.normal(size=(1, 64, 128)).astype(np.float32)
  params = _draw(config, x, num_layers)
  means, ratios = [], []
  # The cores are all that does not average out within a layer.
  scale = initial_scales(config, 128, num_layers).cores
  for _ in range(24):
    cores = np.float32(scale * rng.uniform(size=params['cores'].shape))
    y, read = _forward(params | {'cores': cores}, x, config)
    means.append(read['scores'].mean())
    square = (read['scores'] ** 2).mean()
    ratios.append((y**2).mean() / square * 2 * num_layers)
  assert abs(np.mean(means) - 1) < 0.15
  assert abs(np.mean(ratios) - 1) < 0.1


def test_initial_scales_follow_the_formulas():
  config = _config(num_keys=808, key_dim=192, num_selected=80, init='paper')
  scales = initial_scales(config, 768, 20)
  np.testing.assert_allclose(scales.values, (4 / (2 * 160 * 20)) ** 0.5)
  np.testing.assert_allclose(scales.values, 0.025, rtol=1e-6)
  np.testing.assert_allclose(scales.query_scale, 2.064**-0.5, rtol=1e-3)
  np.testing.assert_allclose(scales.key_scale, 192**-0.5)


# Metrics.


def test_usage_counts_what_was_read():
  config = _config()
  params, x = _init(config)

  @jax.jit
  def run(params, x):
    layer = MemoryLayer(config)
    return layer.apply({'params': params}, x, mutable='intermediates')

  (_, metrics), state = run(params, x)
  (slots,) = state['intermediates']['slots']
  assert slots.shape == (2, 6, 8)
  counts = np.bincount(np.asarray(slots).reshape(-1), minlength=64)
  share = counts / counts.sum()
  kept = share[share > 0]
  np.testing.assert_allclose(metrics['usage_fraction'], np.mean(counts > 0))
  np.testing.assert_allclose(
    metrics['usage_kl'], np.log(64) + np.sum(kept * np.log(kept)), rtol=1e-5
  )
  for name, value in metrics.items():
    assert value.shape == (), name
    assert value.dtype == jnp.float32, name


def test_usage_kl_of_the_extremes():
  kl = jax.jit(usage.usage_kl)
  assert abs(kl(np.full(50, 3, np.int32))) < 1e-5
  one = jax.jit(usage.count_uses, static_argnums=1)(np.full((4, 5), 7), 50)
  np.testing.assert_allclose(kl(one), math.log(50), rtol=1e-6)
  np.testing.assert_allclose(jax.jit(usage.usage_fraction)(one), 1 / 50)


def test_counts_of_used_slots_alone_give_the_same_usage():
  slot = np.random.default_rng(0).integers(0, 20, (5, 6)).astype(np.int32)
  is_counted = slot % 7 > 0

  @functools.partial(jax.jit, static_argnums=2)
  def run(slot, is_counted, is_all):
    if is_all:
      counts = usage.count_uses(slot, 100, is_counted)
    else:
      counts = usage.counts_of_used(slot, is_counted)
    args = (counts, 100)
    return usage.usage_fraction(*args), usage.usage_kl(*args), jnp.sort(counts)

  for counted in (None, is_counted):
    *expected, whole = run(slot, counted, True)
    *actual, kept = run(slot, counted, False)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    np.testing.assert_array_equal(kept[-20:], whole[-20:])
    assert kept.shape == (30,)


def test_aux_loss_is_weighted():
  config = _config(num_cores=1, aux_loss_weight=1e-3)
  params, x = _init(config)
  core = np.broadcast_to(np.diag([1.0, 0.5]), (1, 2, 2, 2)).astype(np.float32)
  _, metrics = _apply(params | {'cores': core}, x, config=config)
  np.testing.assert_allclose(metrics['aux_loss'], 1e-3 * 0.1225, rtol=1e-5)
  np.testing.assert_allclose(metrics['core_singular_1'], 0.5, rtol=1e-6)


# Meshes.


# In the default lane it is so of a family's layers, and of guests' columns.
@pytest.mark.slow
@pytest.mark.parametrize(
  ('sizes', 'scheme', 'variant'),
  [
    ((8, 1, 1), 'grid', {}),
    ((2, 2, 2), 'columns', dict(query_conv_taps=3, tucker_rank=3)),
    ((1, 4, 2), 'rows', {}),
  ],
)
def test_sharded_equals_unsharded(sizes, scheme, variant):
  table = TableConfig(scheme=scheme)
  config = _config(value_dim=16, num_cores=2, table=table, **variant)
  params, x = _init(config, (8, 3, 8))
  cotangent = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)
  layer = MemoryLayer(config)

  def run(params, x, cotangent):
    def loss(params, x):
      y, metrics = layer.apply({'params': params}, x)
      return (y * cotangent).sum() + metrics['aux_loss'], metrics

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)

  expected = jax.jit(run)(params, x, cotangent)
  with jax.set_mesh(mesh_lib.make_mesh(*sizes)):
    spec = mesh_lib.act('BTD')
    x, cotangent = (jax.device_put(a, spec) for a in (x, cotangent))
    declared = parameters(config, 8, 1, scheme)
    sharded = {
      name: jax.device_put(value, declared[name][1])
      for name, value in params.items()
    }
    actual = jax.jit(run)(sharded, x, cotangent)

    def check(a, e):
      # Relative to the array's largest entry: small ones are what is left of
      # large sums that are taken in another order.
      scale = np.max(np.abs(e))
      np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * scale)

    jax.tree.map(check, actual, expected)
    for name, gradient in actual[1][0].items():
      assert gradient.sharding.spec == sharded[name].sharding.spec, name


def test_init_does_not_depend_on_the_mesh():
  config = _config(value_dim=8)
  x = np.ones((8, 1, 8), np.float32)
  expected = _draw(config, x, 1)
  with jax.set_mesh(mesh_lib.make_mesh(2, 1, 4)):
    x = jax.device_put(x, mesh_lib.act('BTD'))
    actual = _draw(config, x, 1)
    for name, value in actual.items():
      # Fusions differ by program, and with them the last bit.
      np.testing.assert_allclose(value, expected[name], rtol=1e-6)
    table = actual['value_table']
    assert table.sharding.spec == mesh_lib.table('columns')


def test_activations_may_be_bf16():
  params, x = _init(_config())

  @jax.jit
  def run(params, x):
    return MemoryLayer(_config(), dtype=jnp.bfloat16).apply(
      {'params': params}, x
    )

  y, metrics = run(params, x)
  assert y.dtype == jnp.bfloat16
  assert metrics['score_mean'].dtype == jnp.float32


# Elsewhere.


class PlainModule(nn.Module):
  """A module of somebody who knows nothing else of jaxsparse."""

  @nn.compact
  def __call__(self, x):
    h = nn.LayerNorm()(nn.Dense(16)(x))
    y, metrics = MemoryLayer(_config())(h)
    return nn.Dense(3)(h + y), metrics['aux_loss']


def test_inside_a_plain_linen_module():
  x, module = np.ones((2, 5, 4), np.float32), PlainModule()

  @jax.jit
  def run(key, x):
    return module.apply(module.init(key, x), x)

  y, aux_loss = run(jax.random.key(0), x)
  assert y.shape == (2, 5, 3)
  assert aux_loss.shape == ()


def test_inside_an_nnx_module():
  class Model(nnx.Module):
    def __init__(self, x, rngs):
      self.dense = nnx.Linear(4, 8, rngs=rngs)
      self.memory = nnx.bridge.ToNNX(MemoryLayer(_config()), rngs=rngs)
      self.memory.lazy_init(self.dense(x))

    def __call__(self, x):
      y, metrics = self.memory(self.dense(x))
      return y.sum() + metrics['aux_loss']

  @nnx.jit
  def gradient(x):
    return nnx.grad(lambda model: model(x))(Model(x, nnx.Rngs(0)))

  x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
  leaves = jax.tree.leaves(nnx.state(gradient(x), nnx.Param))
  assert len(leaves) == 9
  assert all(np.isfinite(leaf).all() for leaf in leaves)
