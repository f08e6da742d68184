# SPDX-License-Identifier: Apache-2.0
"""The train step: the same on every mesh, and in micro-batches."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from small_model import (
  CONFIG,
  equal_losses,
  first_state,
  losses_on_one_device,
  make_batch,
  make_mesh,
  run,
  with_experts,
  with_tables,
)

from jaxsparse import mesh
from jaxsparse.config import OptimizerConfig
from jaxsparse.nn.transformer import Transformer
from jaxsparse.run import checkpoint
from jaxsparse.training import evaluation
from jaxsparse.training.language import eval_step
from jaxsparse.training.losses import token_losses
from jaxsparse.training.step import init_state, train_step


@pytest.mark.slow
def test_state_is_drawn_alike_on_a_mesh():
  config = with_tables('rows')
  with jax.set_mesh(make_mesh((2, 2, 2))):
    state = jax.jit(functools.partial(init_state, config))()
    for a, b in zip(
      *map(jax.tree.leaves, (state, first_state(config))), strict=True
    ):
      assert a.sharding == b.sharding
      np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
  ('scheme', 'shape'),
  [
    pytest.param('grid', (8, 1, 1), marks=pytest.mark.slow),
    pytest.param('columns', (2, 4, 1), marks=pytest.mark.slow),
    pytest.param('columns', (2, 1, 4), marks=pytest.mark.slow),
    ('rows', (2, 2, 2)),
    pytest.param('grid', (2, 2, 2), marks=pytest.mark.slow),
  ],
)
def test_same_losses_on_every_mesh(scheme, shape):
  losses, state = run(with_tables(scheme), shape)
  equal_losses(losses, run(with_tables(), (1, 1, 1))[0])
  moments = state.opt_state.inner_states['values'].inner_state[0].mu
  moments = moments['block_00']['memory']['value_table']
  # No device has more of a moment than another, copies of the table or not.
  assert moments.addressable_shards[0].data.size == 16**2 * 16 / np.prod(shape)


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_experts_give_the_same_losses_on_every_mesh(shape):
  expected, one = run(with_experts(), (1, 1, 1))
  losses, many = run(with_experts(), shape)
  equal_losses(losses, expected)
  for block in ('block_00', 'block_01'):
    a, b = (s.params[block]['moe']['router_bias'] for s in (many, one))
    # Three steps of the load's sign, which rounding does not reach.
    np.testing.assert_allclose(a, b, atol=1e-7)
    assert np.any(a)


def drawn(config, shape):
  """A state of any numbers, from NumPy: a compiled draw takes seconds."""
  rng = np.random.default_rng(0)
  shapes = mesh.abstract(
    functools.partial(init_state, config), mesh=make_mesh(shape)
  )
  return jax.tree.map(
    lambda x: jax.device_put(
      rng.normal(size=x.shape).astype(x.dtype), x.sharding
    ),
    shapes,
  )


def test_state_moves_between_meshes(tmp_path):
  """That of a memory: each leaf is cut and saved by programs of its own."""
  config = with_tables('rows')

  def parts(state):
    values = state.opt_state.inner_states['values']
    return state.params['block_00']['memory'], dict(values=values)

  params, optimizer = parts(drawn(config, (2, 2, 2)))
  checkpoints = checkpoint.Checkpoints(tmp_path, 1)
  checkpoints.save(3, params, optimizer, {})
  checkpoints.wait()
  expected = jax.device_get((params, optimizer))
  init = functools.partial(init_state, config)
  for shape in [(1, 1, 1), (2, 1, 4)]:
    device_mesh = make_mesh(shape)
    abstract = parts(mesh.abstract(init, mesh=device_mesh))
    with jax.set_mesh(device_mesh):
      restored = checkpoints.restore(*abstract, print)[1:3]
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    table = restored[0]['value_table']
    assert len(table.sharding.device_set) == np.prod(shape)
  checkpoints.close()


def test_each_micro_batch_draws_its_own_dropout():
  """Three micro-batches of the same rows, of which dropout makes three."""
  num = 3
  model = dataclasses.replace(
    CONFIG.model, memory=None, num_layers=1, dropout_rate=0.5
  )
  config = dataclasses.replace(
    CONFIG,
    model=model,
    data=dataclasses.replace(CONFIG.data, batch_size=2 * num),
    optimizer=OptimizerConfig(warmup_steps=1, grad_accumulation=num),
  )
  rows = {name: x[:2] for name, x in make_batch(0).items()}

  @jax.jit
  def loss(params, rows, i):
    key = jax.random.fold_in(jax.random.key(config.train.seed), 0)
    (logits, _, _), _ = Transformer(model).apply(
      {'params': params},
      *(rows[name] for name in ('tokens', 'positions', 'segment_ids')),
      deterministic=False,
      rngs={'dropout': jax.random.fold_in(key, i)},
      mutable=['entries'],
    )
    losses = token_losses(logits, rows['targets']) * rows['loss_weight']
    return losses.sum() / rows['loss_weight'].sum()

  with jax.set_mesh(make_mesh((1, 1, 1))):
    state = jax.jit(functools.partial(init_state, config))()
    expected = [float(loss(state.params, rows, i)) for i in range(num)]
    # Every device's share of the rows comes in turn.
    batch = {name: np.repeat(x, num, 0) for name, x in rows.items()}
    _, metrics = jax.jit(functools.partial(train_step, config))(state, batch)
  assert np.ptp(expected[:2]) > 1e-3 < np.ptp(expected[1:])
  np.testing.assert_allclose(metrics['loss'], np.mean(expected), rtol=1e-5)


def with_muon():
  optimizer = dataclasses.replace(
    CONFIG.optimizer, name='muon', learning_rate=1e-2
  )
  return dataclasses.replace(CONFIG, optimizer=optimizer)


@pytest.mark.slow
def test_muon_trains():
  config = with_muon()
  with jax.set_mesh(make_mesh((1, 1, 1))):
    state = jax.jit(functools.partial(init_state, config))()
    step = jax.jit(functools.partial(train_step, config))
    losses = []
    for _ in range(6):
      state, metrics = step(state, make_batch(0))
      losses.append(float(metrics['loss']))
  assert losses == sorted(losses, reverse=True)
  assert losses[-1] < 0.75 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize('shape', [(8, 1, 1), (2, 2, 2)])
def test_muon_gives_the_same_losses_on_every_mesh(shape):
  equal_losses(run(with_muon(), shape)[0], run(with_muon(), (1, 1, 1))[0])


@pytest.mark.slow
def test_dropout_remat_and_bfloat16_train():
  model = dataclasses.replace(
    CONFIG.model, dropout_rate=0.1, use_remat=True, dtype='bfloat16'
  )
  config = dataclasses.replace(CONFIG, model=model)
  losses, _ = run(config, (1, 1, 1))
  assert losses[0] != losses_on_one_device()[0]
  np.testing.assert_allclose(losses[0], losses_on_one_device()[0], rtol=0.1)


def test_validation_counts_targets_and_reads():
  batch, config = (
    make_batch(0),
    with_tables('rows', placements=((0, 1), (1, 1))),
  )
  params = drawn(config, (2, 2, 2)).params
  with jax.set_mesh(make_mesh((2, 2, 2))):
    sums = jax.jit(functools.partial(eval_step, config))(
      params, evaluation.to_global(batch)
    )
  assert float(sums['targets']) == batch['loss_weight'].sum()
  assert sorted(sums['slot_counts']) == ['block_00', 'block_01']
  reads = batch['loss_weight'].sum() * 2 * 6
  for counts in sums['slot_counts'].values():
    assert counts.shape == (256,)
    assert np.asarray(counts).sum() == reads


def test_validation_counts_tokens_of_experts():
  batch, config = make_batch(0), with_experts()
  model = dataclasses.replace(config.model, num_layers=1)
  config = dataclasses.replace(config, model=model)
  params = drawn(config, (8, 1, 1)).params
  with jax.set_mesh(make_mesh((8, 1, 1))):
    sums = jax.jit(functools.partial(eval_step, config))(
      params, evaluation.to_global(batch)
    )
  (count,) = sums['slot_counts'].values()
  assert sums['slot_counts'].keys() == {'block_00 experts'}
  assert count.shape == (8,)
  count = np.asarray(count)
  assert count.sum() == batch['loss_weight'].sum() * 2
  # A token passes an expert once.
  assert count.max() <= batch['loss_weight'].sum()


def test_golden_metrics_of_one_step():
  """Update these numbers only for an intended change of the model."""
  losses, state = run(CONFIG, (1, 1, 1))
  table = np.asarray(state.params['block_00']['memory']['value_table'])
  found = [*losses, float(np.abs(table).mean())]
  np.testing.assert_allclose(found, GOLDEN, rtol=1e-4)


GOLDEN = [4.480505, 4.391696, 4.346835, 0.229998]
