# SPDX-License-Identifier: Apache-2.0
"""A model that trains in a moment, and its runs on any mesh."""

import dataclasses
import functools

import jax
import numpy as np

from jaxsparse import mesh
from jaxsparse.config import (
  Config,
  DataConfig,
  MemoryConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  TableConfig,
  TrainConfig,
)
from jaxsparse.training import evaluation
from jaxsparse.training.step import init_state, train_step

CONFIG = Config(
  model=ModelConfig(
    num_layers=2,
    model_dim=32,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=64,
    vocab_size=50,
    memory=MemoryConfig(
      num_keys=16,
      key_dim=8,
      num_selected=6,
      # Wide enough to be split.
      value_dim=16,
      query_conv_taps=3,
      placements=((0, 1),),
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


class Batches:
  """Two sequences a batch, endless, the same for every start at a step."""

  step = 0

  def __next__(self):
    self.step += 1
    return {k: x[:2] for k, x in make_batch(self.step).items()}

  def get_state(self):
    return {'lanes': {'0': self.step}}

  def set_state(self, state):
    self.step = state['lanes']['0']

  def close(self):
    pass


def make_mesh(shape):
  return mesh.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])


@functools.cache
def drawn_state(config):
  """The state before the first step, drawn on one device."""
  with jax.set_mesh(make_mesh((1, 1, 1))):
    return jax.jit(functools.partial(init_state, config))()


def first_state(config):
  """`drawn_state` on the mesh in use, without compiling the draw for it."""
  settings = dataclasses.replace(
    config.optimizer, value_row_budget=0, grad_accumulation=1, clip_norm=1.0
  )
  memory = config.model.memory
  if memory:
    memory = dataclasses.replace(memory, table=TableConfig())
  plain = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, memory=memory),
    optimizer=settings,
  )
  shapes = mesh.abstract(
    functools.partial(init_state, config), mesh=jax.sharding.get_mesh()
  )
  return jax.tree.map(
    # A copy, as the step may be given it to keep.
    lambda x, shape: jax.device_put(np.array(x), shape.sharding),
    drawn_state(plain),
    shapes,
  )


@functools.cache
def compiled_step(config):
  """The train step, which keeps the state that it is given."""
  return jax.jit(functools.partial(train_step, config), donate_argnums=0)


@functools.cache
def run(config, shape):
  """Losses of the first steps, and the state after them."""
  with jax.set_mesh(make_mesh(shape)):
    state = first_state(config)
    step, losses = compiled_step(config), []
    for seed in range(3):
      state, metrics = step(state, evaluation.to_global(make_batch(seed)))
      losses.append(float(metrics['loss']))
  return losses, state


def losses_on_one_device():
  return run(CONFIG, (1, 1, 1))[0]


def with_tables(
  scheme='auto', value_optimizer='adamw', placements=((0, 1),), **settings
):
  """CONFIG with its tables split, and with their optimizer."""
  memory = dataclasses.replace(
    CONFIG.model.memory,
    table=TableConfig(scheme=scheme),
    placements=placements,
  )
  return dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, memory=memory),
    optimizer=dataclasses.replace(
      CONFIG.optimizer, value_optimizer=value_optimizer, **settings
    ),
  )


# Two layers each, which share tables but for the PEER as published.
FAMILY = dict(
  ultramem_v2=MemoryConfig.ultramem_v2(
    num_keys=12, key_dim=8, num_selected=6, value_dim=16, pre_value_dim=8,
    shared_rows=256, placements=((0, 0), (1, 1)),
  ),
  memory_plus=MemoryConfig.memory_plus(
    num_keys=16, key_dim=8, num_heads=2, num_selected=6, value_dim=32,
    shared_rows=256, placements=((0, 0), (1, 1)),
  ),
  peer=MemoryConfig.peer(
    num_keys=16, key_dim=8, num_heads=2, num_selected=6, value_dim=32,
    pre_value_dim=32, placements=((0, 0), (1, 1)),
  ),
  # Both kinds of tables shared, and quick to compile.
  shared_peer=MemoryConfig.peer(
    num_keys=8, key_dim=4, num_heads=1, num_selected=6, value_dim=32,
    pre_value_dim=32, shared_rows=64, placements=((0, 0), (1, 1)),
  ),
)  # fmt: skip


def with_family(name, scheme='auto', value_optimizer='adamw'):
  """CONFIG with another member of the family of memory layers."""
  memory = dataclasses.replace(FAMILY[name], table=TableConfig(scheme=scheme))
  return dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, memory=memory),
    optimizer=dataclasses.replace(
      CONFIG.optimizer, value_optimizer=value_optimizer
    ),
  )


def with_experts():
  """CONFIG with a mixture in place of every MLP, and no memory."""
  moe = MoEConfig(
    num_experts=8, num_experts_per_token=2, expert_dim=16, num_shared=1,
    router='sigmoid', bias_update_rate=0.01,
  )  # fmt: skip
  return dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, memory=None, moe=moe),
    optimizer=dataclasses.replace(CONFIG.optimizer, value_lr_multiplier=1.0),
  )


def equal_losses(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
  assert actual[0] != actual[1]
