"""The train step: the same on every mesh, and in micro-batches."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jaxsparse import checkpoint, mesh
from jaxsparse.config import (
  Config,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
  TrainConfig,
  UltraMemConfig,
)
from jaxsparse.training import evaluation
from jaxsparse.training.step import eval_step, init_state, train_step

CONFIG = Config(
  model=ModelConfig(
    num_layers=3,
    model_dim=32,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=64,
    vocab_size=50,
    memory=UltraMemConfig(
      num_keys=16,
      key_dim=8,
      num_selected=6,
      value_dim=8,
      query_conv_taps=3,
      placements=((0, 1), (1, 2)),
    ),
  ),
  data=DataConfig(seq_len=16, batch_size=16),
  optimizer=OptimizerConfig(warmup_steps=1, value_lr_multiplier=4.0),
  train=TrainConfig(num_steps=10),
)


def make_batch(seed):
  rng = np.random.default_rng(seed)
  shape = (CONFIG.data.batch_size, CONFIG.data.seq_len)
  segment_ids = np.repeat([[1] * 6 + [2] * 8 + [0] * 2], shape[0], 0)
  positions = np.repeat([[*range(6), *range(8), 0, 0]], shape[0], 0)
  tokens = rng.integers(50, size=shape)
  return dict(
    tokens=tokens.astype(np.int32),
    targets=np.roll(tokens, -1, 1).astype(np.int32),
    positions=positions.astype(np.int32),
    segment_ids=segment_ids.astype(np.int32),
    loss_weight=(segment_ids > 0).astype(np.float32),
  )


def make_mesh(shape):
  return mesh.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])


@functools.cache
def run(config, shape):
  """Losses of the first steps, and the state after them."""
  with jax.set_mesh(make_mesh(shape)):
    state = jax.jit(functools.partial(init_state, config))()
    step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
    losses = []
    for seed in range(3):
      state, metrics = step(state, evaluation.to_global(make_batch(seed)))
      losses.append(float(metrics['loss']))
  return losses, state


def losses_on_one_device():
  return run(CONFIG, (1, 1, 1))[0]


def with_tables(scheme='auto', value_optimizer='adamw', **settings):
  """CONFIG with a table wide enough to be split, and its optimizer."""
  memory = dataclasses.replace(CONFIG.model.memory, scheme=scheme, value_dim=16)
  return dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, memory=memory),
    optimizer=dataclasses.replace(
      CONFIG.optimizer, value_optimizer=value_optimizer, **settings
    ),
  )


def equal_losses(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
  assert actual[0] != actual[1]


@pytest.mark.parametrize(
  ('scheme', 'shape'),
  [
    ('grid', (8, 1, 1)),
    ('columns', (2, 4, 1)),
    ('columns', (2, 1, 4)),
    ('rows', (2, 2, 2)),
    ('grid', (2, 2, 2)),
  ],
)
def test_same_losses_on_every_mesh(scheme, shape):
  losses, state = run(with_tables(scheme), shape)
  equal_losses(losses, run(with_tables(), (1, 1, 1))[0])
  moments = state.opt_state.inner_states['values'].inner_state[0].mu
  moments = moments['block_00']['memory']['value_table']
  # No device has more of a moment than another, copies of the table or not.
  assert moments.addressable_shards[0].data.size == 16**2 * 16 / np.prod(shape)


@functools.cache
def run_rows(value_optimizer, scheme, shape, **settings):
  return run(with_tables(scheme, value_optimizer, **settings), shape)


@pytest.mark.parametrize(
  ('value_optimizer', 'scheme', 'shape'),
  [
    ('row_adam', 'columns', (2, 4, 1)),
    ('row_adam', 'rows', (2, 2, 2)),
    ('lazy_row_adam', 'grid', (2, 2, 2)),
    ('row_adagrad', 'columns', (2, 2, 2)),
    ('row_adagrad', 'grid', (8, 1, 1)),
  ],
)
def test_row_optimizers_give_the_same_on_every_mesh(
  value_optimizer, scheme, shape
):
  expected, one = run_rows(value_optimizer, 'auto', (1, 1, 1))
  losses, many = run_rows(value_optimizer, scheme, shape)
  equal_losses(losses, expected)
  for block in ('block_00', 'block_01'):
    a, b = (s.params[block]['memory']['value_table'] for s in (many, one))
    np.testing.assert_allclose(a, b, atol=1e-3)


@pytest.mark.parametrize('scheme', ['columns', 'rows'])
def test_passes_and_micro_batches_change_nothing_by_rows(scheme):
  """A budget of 20 rows, of about 200 that are read, over two micro-batches."""
  losses, _ = run_rows(
    'row_adam', scheme, (2, 2, 2), value_row_budget=20, grad_accumulation=2
  )
  equal_losses(losses, run_rows('row_adam', 'auto', (1, 1, 1))[0])


def test_first_step_by_rows_is_the_dense_one():
  """The tap's gradient is whole: one norm, one clipping, one first step."""

  def first(config):
    with jax.set_mesh(make_mesh((2, 2, 1))):
      state = jax.jit(functools.partial(init_state, config))()
      step = jax.jit(functools.partial(train_step, config))
      state, metrics = step(state, evaluation.to_global(make_batch(0)))
    return metrics, state.params['block_01']['memory']['value_table']

  dense, table = first(with_tables(clip_norm=0.1))
  rows, row_table = first(with_tables('rows', 'row_adam', clip_norm=0.1))
  np.testing.assert_allclose(rows['grad_norm'], dense['grad_norm'], rtol=1e-5)
  assert dense['grad_norm'] > 0.1
  # Adam's first step is of the full rate, but for gradients near epsilon.
  np.testing.assert_allclose(row_table, table, atol=1e-4)
  assert 0 < rows['value_rows_touched'] <= 2 * 256
  assert rows['value_rows_over_budget'] == 0


def test_state_moves_between_meshes(tmp_path):
  _, state = run(CONFIG, (8, 1, 1))
  checkpoints = checkpoint.Checkpoints(tmp_path, 1)
  optimizer = {'step': state.step, 'opt_state': state.opt_state}
  checkpoints.save(3, state.params, optimizer, {})
  checkpoints.wait()
  init = functools.partial(init_state, CONFIG)
  for shape in [(1, 1, 1), (2, 1, 4)]:
    device_mesh = make_mesh(shape)
    abstract = mesh.abstract(init, mesh=device_mesh)
    with jax.set_mesh(device_mesh):
      optimizer = {'step': abstract.step, 'opt_state': abstract.opt_state}
      restored = checkpoints.restore(abstract.params, optimizer, print)
    jax.tree.map(np.testing.assert_array_equal, restored[1], state.params)
    table = restored[1]['block_00']['memory']['value_table']
    assert len(table.sharding.device_set) == np.prod(shape)
  checkpoints.close()


def test_micro_batches_change_nothing():
  optimizer = dataclasses.replace(CONFIG.optimizer, grad_accumulation=4)
  config = dataclasses.replace(CONFIG, optimizer=optimizer)
  losses, _ = run(config, (2, 2, 1))
  np.testing.assert_allclose(losses, losses_on_one_device(), atol=1e-5)


def test_dropout_remat_and_bfloat16_train():
  model = dataclasses.replace(
    CONFIG.model, dropout_rate=0.1, use_remat=True, dtype='bfloat16'
  )
  config = dataclasses.replace(CONFIG, model=model)
  losses, _ = run(config, (1, 1, 1))
  assert losses[0] != losses_on_one_device()[0]
  np.testing.assert_allclose(losses[0], losses_on_one_device()[0], rtol=0.1)


def test_validation_counts_targets_and_reads():
  batch = make_batch(0)
  _, state = run(CONFIG, (8, 1, 1))
  with jax.set_mesh(make_mesh((8, 1, 1))):
    sums = jax.jit(functools.partial(eval_step, CONFIG))(
      state.params, evaluation.to_global(batch)
    )
  assert float(sums['targets']) == batch['loss_weight'].sum()
  assert sorted(sums['slot_counts']) == ['block_00', 'block_01']
  reads = batch['loss_weight'].sum() * 2 * 6
  for counts in sums['slot_counts'].values():
    assert counts.shape == (256,)
    assert counts.sum() == reads


def test_golden_metrics_of_one_step():
  """Update these numbers only for an intended change of the model."""
  losses, state = run(CONFIG, (1, 1, 1))
  table = np.asarray(state.params['block_00']['memory']['value_table'])
  found = [*losses, float(np.abs(table).mean())]
  np.testing.assert_allclose(found, GOLDEN, rtol=1e-4)


GOLDEN = [4.439692, 4.340010, 4.401155, 0.186096]
