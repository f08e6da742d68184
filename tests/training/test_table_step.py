# SPDX-License-Identifier: Apache-2.0
"""The train step of value tables by rows: the same on every mesh."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from small_model import (
  CONFIG,
  equal_losses,
  first_state,
  make_batch,
  make_mesh,
  run,
  with_family,
  with_tables,
)

from jaxsparse.config import TableConfig
from jaxsparse.training import evaluation
from jaxsparse.training.step import init_state, train_step
from jaxsparse.training.table_step import split_tables

TWO = ((0, 1), (1, 1))


@functools.cache
def run_rows(value_optimizer, scheme, shape):
  return run(with_tables(scheme, value_optimizer, TWO), shape)


@pytest.mark.parametrize(
  ('value_optimizer', 'scheme', 'shape'),
  [
    pytest.param('row_adam', 'columns', (2, 4, 1), marks=pytest.mark.slow),
    pytest.param('row_adagrad', 'grid', (2, 2, 2), marks=pytest.mark.slow),
    pytest.param('row_adam', 'rows', (2, 2, 2), marks=pytest.mark.slow),
    pytest.param('lazy_row_adam', 'grid', (2, 2, 2), marks=pytest.mark.slow),
    pytest.param('row_adagrad', 'columns', (2, 2, 2), marks=pytest.mark.slow),
    pytest.param('row_adagrad', 'grid', (8, 1, 1), marks=pytest.mark.slow),
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


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['columns', 'rows'])
def test_passes_and_micro_batches_change_nothing_by_rows(scheme):
  """A budget of 20 rows, of about 200 that are read, over two micro-batches."""

  def losses(scheme, shape, **settings):
    config = with_tables(scheme, 'row_adam', **settings)
    memory = dataclasses.replace(config.model.memory, placements=((0, 0),))
    model = dataclasses.replace(config.model, num_layers=1, memory=memory)
    return run(dataclasses.replace(config, model=model), shape)[0]

  many = losses(scheme, (2, 2, 2), value_row_budget=20, grad_accumulation=2)
  equal_losses(many, losses('auto', (1, 1, 1)))


def first_step(config):
  step = jax.jit(functools.partial(train_step, config))
  state, metrics = step(
    first_state(config), evaluation.to_global(make_batch(0))
  )
  return metrics, state.params


@pytest.mark.slow
def test_first_step_by_rows_is_the_dense_one():
  """The probe's gradient is whole: one norm, one clipping, one first step."""

  def first(config):
    with jax.set_mesh(make_mesh((2, 2, 1))):
      metrics, params = first_step(config)
    return metrics, params['block_01']['memory']['value_table']

  settings = dict(placements=TWO, clip_norm=0.1)
  dense, table = first(with_tables(**settings))
  rows, row_table = first(with_tables('rows', 'row_adam', **settings))
  np.testing.assert_allclose(rows['grad_norm'], dense['grad_norm'], rtol=1e-5)
  assert dense['grad_norm'] > 0.1
  # Adam's first step is of the full rate, but for gradients near epsilon.
  np.testing.assert_allclose(row_table, table, atol=1e-4)
  assert 0 < rows['value_rows_touched'] <= 2 * 256
  assert rows['value_rows_over_budget'] == 0


@functools.cache
def first_of_family(name, value_optimizer, scheme, shape):
  with jax.set_mesh(make_mesh(shape)):
    metrics, params = first_step(with_family(name, scheme, value_optimizer))
  return metrics, split_tables(params)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'value_optimizer', 'scheme'),
  [
    ('shared_peer', 'row_adam', 'grid'),
    ('ultramem_v2', 'row_adam', 'rows'),
    ('ultramem_v2', 'row_adam', 'columns'),
    ('ultramem_v2', 'row_adam', 'grid'),
    ('ultramem_v2', 'lazy_row_adam', 'grid'),
    ('ultramem_v2', 'row_adagrad', 'grid'),
    ('memory_plus', 'row_adam', 'grid'),
    ('memory_plus', 'row_adagrad', 'columns'),
    ('peer', 'row_adam', 'grid'),
    ('peer', 'row_adagrad', 'rows'),
  ],
)
def test_layers_that_share_tables_step_once(name, value_optimizer, scheme):
  """Their entries meet in one update of values and of pre-values."""
  # Adam's first step is the same by rows; Adagrad by rows is another rule.
  is_adagrad = value_optimizer == 'row_adagrad'
  plain = value_optimizer if is_adagrad else 'adamw'
  one, expected = first_of_family(name, plain, 'auto', (1, 1, 1))
  metrics, tables = first_of_family(name, value_optimizer, scheme, (2, 2, 2))
  for figure in ('loss', 'grad_norm'):
    np.testing.assert_allclose(metrics[figure], one[figure], rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), tables, expected
  )
  num_tables = len(jax.tree.leaves(tables))
  assert 0 < metrics['value_rows_touched'] <= num_tables * 256


def test_a_step_holds_no_other_copy_of_a_narrow_table():
  """Forward, backward and update read and change 134 MB where they lie."""
  memory = dataclasses.replace(
    CONFIG.model.memory,
    num_keys=512,
    value_dim=256,
    table=TableConfig(dtype='bfloat16'),
    placements=((0, 0),),
  )
  config = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, num_layers=1, memory=memory),
    optimizer=dataclasses.replace(
      CONFIG.optimizer, value_optimizer='row_adagrad'
    ),
  )
  with jax.set_mesh(make_mesh((1, 1, 1))):
    state = jax.eval_shape(functools.partial(init_state, config))
    leaves, structure = jax.tree.flatten(state)

    def step(leaves, batch):
      return train_step(config, jax.tree.unflatten(structure, leaves), batch)

    program = jax.jit(step, donate_argnums=0).lower(leaves, make_batch(0))
    sizes = program.compile().memory_analysis()
  table_bytes = memory.table_rows * memory.value_dim * 2
  assert sizes.temp_size_in_bytes < table_bytes / 3
  assert sizes.alias_size_in_bytes > table_bytes
