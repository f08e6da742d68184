# SPDX-License-Identifier: Apache-2.0
"""Rows on the host are asked for where they are known, and awaited where used.

What a GPU or a TPU does, forced on a CPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import config as c
from jaxsparse.nn.transformer import Transformer
from jaxsparse.ops.tables.host_table import HostTable, Source
from jaxsparse.run import table_leaves

MODEL = c.ModelConfig(
  num_layers=2, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4,
  mlp_dim=8, vocab_size=16,
  memory=c.MemoryConfig(
    num_keys=8, key_dim=4, num_selected=4, value_dim=8, placements=((0, 1),),
  ),
)  # fmt: skip


class Told(Source):
  """Says what is asked of it."""

  def __init__(self, rows, told):
    super().__init__(rows)
    self._told = told

  def ask(self, *args, **options):
    self._told.append('ask')
    return super().ask(*args, **options)

  def collect(self, *args):
    self._told.append('collect')
    return super().collect(*args)

  def take(self, ids):
    self._told.append('take')
    return super().take(ids)


@pytest.fixture(scope='module')
def params():
  rng = np.random.default_rng(0)
  tokens = jnp.zeros((2, 6), jnp.int32)
  shapes = jax.eval_shape(
    lambda: Transformer(MODEL).init(jax.random.key(0), tokens)
  )
  return jax.tree.map(
    lambda x: jnp.asarray(rng.normal(1, 0.5, x.shape), x.dtype),
    shapes['params'],
  )


@pytest.mark.parametrize(
  ('placement', 'use_remat', 'expected'),
  [
    ((0, 1), False, ['ask', 'collect']),
    pytest.param((0, 0), False, ['take'], marks=pytest.mark.slow),
    # Blocks that are computed again return arrays alone.
    pytest.param((0, 1), True, ['take'], marks=pytest.mark.slow),
  ],
)
def test_loss_and_gradient_are_those_of_the_table(
  params, placement, use_remat, expected
):
  memory = dataclasses.replace(MODEL.memory, placements=(placement,))
  model = dataclasses.replace(MODEL, memory=memory, use_remat=use_remat)
  tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, 16)
  rest, tables = table_leaves.split(params)
  told = []
  on_host = {
    name: HostTable(Told(np.asarray(x), told), x.shape, np.dtype(x.dtype))
    for name, x in tables.items()
  }

  @jax.jit
  @jax.value_and_grad
  def loss(rest, tables):
    params = table_leaves.joined(rest, tables)
    logits, _, _ = Transformer(model).apply({'params': params}, tokens)
    return jnp.mean(logits**2)

  actual, wanted = loss(rest, on_host), loss(rest, tables)
  jax.tree.map(np.testing.assert_array_equal, actual, wanted)
  assert told[: len(expected)] == expected
