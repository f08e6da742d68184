# SPDX-License-Identifier: Apache-2.0
"""Rows in training: a base that stays, and differences of a few rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from small_model import drawn_state, make_batch, make_mesh, with_family

from jaxsparse import mesh as mesh_lib
from jaxsparse.config import AdapterConfig
from jaxsparse.nn import row_deltas
from jaxsparse.nn.transformer import Transformer, init_params
from jaxsparse.training import adapters, evaluation
from jaxsparse.training.losses import token_losses
from jaxsparse.training.step import parts_from, train_step

ADAPTER = AdapterConfig(kind='rows', num_rows=40)


def of_rows(name, scheme='auto', value_optimizer='adamw'):
  config = with_family(name, scheme, value_optimizer)
  train = dataclasses.replace(config.train, start_from='base')
  return dataclasses.replace(config, adapter=ADAPTER, train=train)


PEER = of_rows('shared_peer')


def base(config):
  """Parameters laid on the mesh in use."""
  plain = dataclasses.replace(
    config,
    adapter=AdapterConfig(),
    train=dataclasses.replace(config.train, start_from=''),
  )
  shapes = mesh_lib.abstract(
    lambda: init_params(config.model, jax.random.key(0)),
    mesh=jax.sharding.get_mesh(),
  )
  drawn = drawn_state(plain).params
  return jax.tree.map(
    lambda x, to: jax.device_put(np.array(x), to.sharding), drawn, shapes
  )


def beginning(config):
  """What is trained and what stands beside it, on the mesh in use."""
  params = base(config)
  rows = {
    path.rpartition('/')[0]: np.arange(0, len(table), 3, dtype=np.int32)
    for path, table in row_deltas.tables(params).items()
  }
  return parts_from(config, row_deltas.learnt(params, rows))


@functools.cache
def trained(config, shape, num_steps=3):
  """Losses, the state and the frozen part after some steps, and before."""
  with jax.set_mesh(make_mesh(shape)):
    state, frozen = beginning(config)
    step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
    before, losses = jax.tree.map(np.array, frozen), []
    for seed in range(num_steps):
      batch = evaluation.to_global(make_batch(seed))
      state, metrics = step(state, batch, frozen)
      losses.append(float(metrics['loss']))
  return losses, jax.device_get(state), before, jax.tree.map(np.array, frozen)


def test_training_moves_the_differences_alone():
  losses, state, before, after = trained(PEER, (1, 1, 1))
  jax.tree.map(np.testing.assert_array_equal, after, before)
  assert losses[0] != losses[1]
  tables = state.params['memory']
  assert set(state.params) == {'memory'}
  assert set(tables) == {'value_table', 'pre_value_table'}
  for table in tables.values():
    assert table['values'].shape == (22, 32)
    assert table['values'].any()
  # Two moments of each number, and nothing of the base.
  size = sum(x.size for x in jax.tree.leaves(state.params))
  moments = [x for x in jax.tree.leaves(state.opt_state) if np.ndim(x)]
  assert sum(x.nbytes for x in moments) == 8 * size


@pytest.mark.slow
def test_gradient_is_that_of_the_rows_of_the_dense_tables():
  batch = make_batch(0)

  def loss(params):
    inputs = (batch[k] for k in ('tokens', 'positions', 'segment_ids'))
    logits, _, _ = Transformer(PEER.model).apply(
      {'params': params}, *map(jnp.asarray, inputs)
    )
    losses = token_losses(logits, jnp.asarray(batch['targets']))
    return (losses * batch['loss_weight']).mean()

  with jax.set_mesh(make_mesh((1, 1, 1))):
    state, frozen = beginning(PEER)

    @jax.jit
    def gradients(values, dense):
      def of_values(values):
        return loss(adapters.join(PEER, frozen, values))

      return jax.grad(of_values)(values), jax.grad(loss)(dense)

    of_rows, of_tables = gradients(state.params, row_deltas.without(frozen))
  for name in ('value_table', 'pre_value_table'):
    expected = np.asarray(of_tables['memory'][name])[::3]
    actual = np.asarray(of_rows['memory'][name]['values'])
    assert np.abs(expected).max() > 0
    bound = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=bound)


@pytest.mark.parametrize(
  ('config', 'shape'),
  few(
    [(PEER, (2, 2, 2))],
    [
      (PEER, (2, 2, 2)),
      (of_rows('shared_peer', 'rows'), (2, 2, 2)),
      (of_rows('shared_peer', 'grid'), (2, 2, 2)),
      (of_rows('ultramem_v2', 'columns'), (1, 4, 2)),
      (of_rows('memory_plus', 'rows'), (2, 4, 1)),
      # Of the base, whose tables have no gradient here.
      (of_rows('shared_peer', 'rows', 'row_adam'), (2, 2, 2)),
    ],
  ),
)
def test_every_mesh_trains_the_same(config, shape):
  alone, state, *_ = trained(config, (1, 1, 1))
  losses, on_mesh, *_ = trained(config, shape)
  np.testing.assert_allclose(losses, alone, rtol=0, atol=1e-5)
  for actual, expected in zip(
    jax.tree.leaves(on_mesh.params), jax.tree.leaves(state.params), strict=True
  ):
    bound = 1e-3 * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def test_the_number_of_trained_parameters_is_said():
  with jax.set_mesh(make_mesh((1, 1, 1))):
    _, frozen = beginning(PEER)
  said = adapters.describe(PEER, frozen)
  assert said.startswith('1,408 parameters are trained, in 44 rows of tables: ')
