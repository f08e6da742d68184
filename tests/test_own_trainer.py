# SPDX-License-Identifier: Apache-2.0
"""The documentation's trainer of one's own beside ours."""

import dataclasses
import functools
import importlib.util
import pathlib

import jax
import numpy as np
import optax
import pytest
from lanes import few

import jaxsparse
from jaxsparse import mesh as mesh_lib
from jaxsparse.config import Config, DataConfig, OptimizerConfig, TrainConfig
from jaxsparse.training import step

GUIDE = pathlib.Path(__file__).parents[1] / 'docs/guides/own_trainer.py'
AUTO, EXPLICIT = jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit
NUM_STEPS, LENGTH = 4, 16
OPTIMIZER = OptimizerConfig(
  learning_rate=3e-3,
  warmup_steps=1,
  weight_decay=0.0,
  value_lr_multiplier=1.0,
  value_weight_decay=0.0,
  value_optimizer='row_adam',
  clip_norm=1.0,
  b2=0.999,
)


@pytest.fixture(scope='module')
def guide():
  spec = importlib.util.spec_from_file_location('own_trainer', GUIDE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  # Less to compile than its two blocks.
  memory = dataclasses.replace(module.MODEL.memory, placements=((0, 0),))
  module.MODEL = dataclasses.replace(module.MODEL, num_layers=1, memory=memory)
  return module


@pytest.mark.parametrize('kind', few([EXPLICIT], [AUTO, EXPLICIT]))
def test_it_ends_where_our_trainer_does(guide, kind):
  config = Config(
    model=guide.MODEL,
    data=DataConfig(batch_size=8, seq_len=LENGTH),
    optimizer=OPTIMIZER,
    train=TrainConfig(num_steps=NUM_STEPS),
  )
  rng = np.random.default_rng(0)
  texts = rng.integers(0, 256, (NUM_STEPS, 8, LENGTH + 1)).astype(np.int32)
  params, ours, losses = by_our_trainer(config, texts)

  mesh = jax.make_mesh(
    (2, 2),
    ('replica', 'shard'),
    axis_types=(kind,) * 2,
    devices=jax.devices()[:4],
  )
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=3e-4,
    peak_value=3e-3,
    warmup_steps=1,
    decay_steps=NUM_STEPS,
    end_value=OPTIMIZER.final_lr_fraction * 3e-3,
  )

  def place(path, leaf):
    is_table = path[-1].key.endswith('_table')
    return jax.device_put(leaf, jax.P('shard' if is_table else None))

  with jax.set_mesh(mesh):
    params = jax.tree.map_with_path(place, params)
    theirs, their_losses = guide.train(params, texts, schedule)
  np.testing.assert_allclose(their_losses, losses, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      np.asarray(a), np.asarray(b), atol=3e-4
    ),
    theirs,
    ours,
  )


def by_our_trainer(config, texts):
  """The first and last parameters, and losses, on a device of our own mesh."""
  losses = []
  with jax.set_mesh(mesh_lib.make_mesh(1, 1, 1, jax.devices()[:1])):
    state = jax.jit(functools.partial(step.init_state, config))()
    first = jax.device_get(state.params)
    run = jax.jit(functools.partial(step.train_step, config))
    for text in texts:
      batch = dict(
        tokens=text[:, :-1],
        targets=text[:, 1:],
        positions=np.broadcast_to(np.arange(LENGTH), (8, LENGTH)),
        segment_ids=np.ones((8, LENGTH)),
        loss_weight=np.ones((8, LENGTH), np.float32),
      )
      batch = {
        name: jax.device_put(
          x if name == 'loss_weight' else x.astype(np.int32), mesh_lib.act('BT')
        )
        for name, x in batch.items()
      }
      state, metrics = run(state, batch)
      losses.append(float(metrics['loss']))
    state = jax.jit(functools.partial(step.finalize, config))(state)
  return first, jax.device_get(state.params), losses


def test_it_is_as_short_as_it_says():
  lines = GUIDE.read_text().splitlines()
  assert len([line for line in lines if line.strip()]) <= 66


def test_an_axis_of_one_device_cuts_nothing(guide):
  """Rows are read and written where there is but one part of a table."""
  tokens = jax.numpy.zeros((4, LENGTH + 1), jax.numpy.int32)
  init = jaxsparse.Transformer(guide.MODEL, axes=guide.AXES).init

  def first_step(key, tokens):
    params = init(key, tokens[:, :-1])['params']
    optimizer = guide.make_optimizer(params, 3e-3)
    state = optimizer.init(params)
    return guide.take_step(optimizer, params, state, tokens)

  mesh = jax.make_mesh((4, 1), ('replica', 'shard'), devices=jax.devices()[:4])
  with jax.set_mesh(mesh):
    _, _, loss = jax.eval_shape(first_step, jax.random.key(0), tokens)
  assert loss.shape == ()
