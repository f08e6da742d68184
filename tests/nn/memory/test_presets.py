# SPDX-License-Identifier: Apache-2.0
"""Every preset works as it is, alone and in a model, whatever their width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse import mesh
from jaxsparse.analysis import cost
from jaxsparse.config import (
  Config,
  DataConfig,
  MemoryConfig,
  ModelConfig,
  OptimizerConfig,
)
from jaxsparse.nn.memory.layer import MemoryLayer
from jaxsparse.nn.transformer import Transformer
from jaxsparse.training.step import init_state, train_step

PRESETS = ('ultramem', 'pkm', 'peer', 'memory_plus', 'ultramem_v2')


@pytest.mark.parametrize('name', few(['ultramem', 'pkm', 'peer'], PRESETS))
def test_alone(name):
  layer = MemoryLayer(getattr(MemoryConfig, name)())
  x = jax.random.normal(jax.random.key(0), (2, 3, 20))
  (y, metrics), params = jax.jit(layer.init_with_output)(jax.random.key(1), x)
  assert y.shape == x.shape
  assert np.isfinite(y).all()
  assert np.abs(y).max() > 0
  assert metrics['usage_fraction'] > 0
  tables = [k for k in params['params'] if k.endswith('_table')]
  assert len(tables) == (2 if name in ('peer', 'ultramem_v2') else 1)


@pytest.mark.parametrize('name', PRESETS)
def test_in_a_model(name):
  memory = getattr(MemoryConfig, name)()
  config = ModelConfig(model_dim=24, vocab_size=9, memory=memory)
  tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)
  params = jax.eval_shape(
    Transformer(config).init, jax.random.key(0), tokens, tokens, tokens
  )['params']
  counted = sum(x.size for x in jax.tree.leaves(params))
  assert counted == cost.count_parameters(config).total


def test_row_optimizers_train_one_whose_widths_are_the_models():
  memory = MemoryConfig.peer(placements=((0, 0),))
  config = Config(
    model=ModelConfig(num_layers=1, model_dim=24, vocab_size=9, memory=memory),
    data=DataConfig(batch_size=2, seq_len=4),
    optimizer=OptimizerConfig(value_optimizer='row_adam'),
  )
  tokens = jax.ShapeDtypeStruct((2, 4), jnp.int32)
  names = ('tokens', 'targets', 'positions', 'segment_ids')
  batch = dict.fromkeys(names, tokens) | dict(
    loss_weight=jax.ShapeDtypeStruct((2, 4), jnp.float32)
  )
  with jax.set_mesh(mesh.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
    before = jax.eval_shape(lambda: init_state(config))
    after, _ = jax.eval_shape(
      lambda state, batch: train_step(config, state, batch), before, batch
    )
  tables = before.params['block_00']['memory']
  for name in ('value_table', 'pre_value_table'):
    assert tables[name].shape == (memory.table_rows, 24)
  assert jax.tree.structure(after) == jax.tree.structure(before)
