# SPDX-License-Identifier: Apache-2.0
"""Reads of rows, of every kind of memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from parameters import draw
from small_model import CONFIG, make_batch, with_family

from jaxsparse.nn.transformer import Transformer
from jaxsparse.ops.memory.row_ranking import NO_ROW
from jaxsparse.training import row_reads

BATCH = {name: x[:8] for name, x in make_batch(0).items()}


def table_gradients(model, params):
  """Of what all tokens write but padding."""

  @jax.jit
  def run(params, batch):
    inputs = (batch[k] for k in ('tokens', 'positions', 'segment_ids'))
    logits, _, _ = Transformer(model).apply({'params': params}, *inputs)
    return (jnp.sin(logits) * batch['loss_weight'][..., None]).sum()

  return jax.grad(run)(params, BATCH)


@pytest.mark.parametrize(
  'name',
  few(
    ['shared_peer'],
    ['ultramem', 'ultramem_v2', 'memory_plus', 'peer', 'shared_peer'],
  ),
)
def test_rows_that_are_read_are_those_with_a_gradient(name):
  model = (CONFIG if name == 'ultramem' else with_family(name)).model
  if name == 'shared_peer':
    # Two windows, which have no row in common.
    memory = dataclasses.replace(model.memory, shared_rows=128)
    model = dataclasses.replace(model, memory=memory)
  drawn = draw(Transformer(model).init, *(jnp.ones((1, 2), jnp.int32),) * 3)
  params = drawn['params']
  gradients = table_gradients(model, params)
  reads = row_reads.reads_of(model, params, BATCH)
  assert len(reads) == (1 if model.memory.shared_rows or name == 'ultramem'
                        else 2)  # fmt: skip
  for owner, rows in reads.items():
    is_padding = BATCH['segment_ids'] == 0
    assert (rows[is_padding] == NO_ROW).all()
    module = gradients
    for part in owner.split('/'):
      module = module[part]
    found = np.unique(rows[~is_padding])
    changed = np.flatnonzero(np.abs(module['value_table']).max(axis=1))
    # Some scores are zero.
    assert set(changed) <= set(found)
    assert len(changed) > 0.8 * len(found)
    # Layers that share a table have windows of it.
    if model.memory.shared_rows:
      half = rows.shape[-1] // 2
      assert not np.array_equal(rows[..., :half], rows[..., half:])
