"""Every preset works as it is, alone and in a model, whatever their width."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.analysis import cost
from jaxsparse.config import MemoryConfig, ModelConfig
from jaxsparse.nn.memory.layer import MemoryLayer
from jaxsparse.nn.transformer import Transformer

PRESETS = ('ultramem', 'pkm', 'peer', 'memory_plus', 'ultramem_v2')


@pytest.mark.parametrize('name', PRESETS)
def test_alone(name):
  layer = MemoryLayer(getattr(MemoryConfig, name)())
  x = jax.random.normal(jax.random.key(0), (2, 3, 20))
  (y, metrics), params = jax.jit(layer.init_with_output)(jax.random.key(1), x)
  assert y.shape == x.shape
  assert np.isfinite(y).all()
  assert np.abs(y).max() > 0
  assert metrics['slots_used'] > 0
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
