# SPDX-License-Identifier: Apache-2.0
"""Value tables in bfloat16, through a step of every optimizer of theirs.

Without a copy in f32 a row's new values are rounded up or down at random, alike
on every mesh; with one they are the copy's, rounded to the nearest. So the copy
after a step tells what the rounded ones should be on average.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, make_batch, make_mesh

from jaxsparse import mesh
from jaxsparse.config import MemoryConfig, TableConfig
from jaxsparse.training import evaluation
from jaxsparse.training.language import eval_step
from jaxsparse.training.step import init_state, train_step

MEMORY = MemoryConfig(
  num_keys=16, key_dim=4, num_selected=6, value_dim=16, grid='additive',
  score_activation='softmax', expansion=1, table=TableConfig(dtype='bfloat16'),
  placements=((0, 0),),
)  # fmt: skip
MODEL = dataclasses.replace(
  CONFIG.model, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=2,
  mlp_dim=16, memory=MEMORY,
)  # fmt: skip
ROWS, COLUMNS, GRID = (
  ('rows', (1, 2, 1)),
  ('columns', (1, 2, 2)),
  ('grid', (2, 2, 1)),
)
ONE = ('auto', (1, 1, 1))


def first_state(config):
  """Drawn without JAX, whose compiled draws take seconds."""
  init = functools.partial(init_state, config)
  shapes = mesh.abstract(init, mesh=jax.sharding.get_mesh())
  rng = np.random.default_rng(0)

  def put(x, shape):
    return jax.device_put(np.asarray(x, shape.dtype), shape.sharding)

  params = jax.tree.map(
    lambda x: put(0.3 * rng.normal(size=x.shape), x), shapes.params
  )

  def begin(path, shape):
    if '.master' in jax.tree_util.keystr(path):
      return put(params['block_00']['memory']['value_table'], shape)
    return put(np.zeros(shape.shape), shape)

  state = jax.tree.map_with_path(begin, shapes)
  return dataclasses.replace(state, params=params)


@functools.cache
def step(value_optimizer, where=ONE, *, value_master=False):
  """The table before and after a step, that in f32 if there is one, metrics."""
  scheme, shape = where
  config = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(
      MODEL,
      memory=dataclasses.replace(
        MEMORY, table=dataclasses.replace(MEMORY.table, scheme=scheme)
      ),
    ),
    optimizer=dataclasses.replace(
      CONFIG.optimizer,
      value_optimizer=value_optimizer,
      value_master=value_master,
      learning_rate=1e-2,
    ),
  )
  with jax.set_mesh(make_mesh(shape)):
    before = first_state(config)
    run = jax.jit(functools.partial(train_step, config))
    state, metrics = run(before, evaluation.to_global(make_batch(0)))
  masters = [
    np.asarray(leaf)
    for path, leaf in jax.tree.leaves_with_path(state.opt_state)
    if '.master' in jax.tree_util.keystr(path)
  ]
  tables = (
    x.params['block_00']['memory']['value_table'] for x in (before, state)
  )
  assert state.params['block_00']['memory']['value_table'].dtype == jnp.bfloat16
  before, after = (np.asarray(x) for x in tables)
  return before, after, masters, {n: float(x) for n, x in metrics.items()}


@pytest.mark.parametrize(
  'value_optimizer',
  [
    pytest.param('adamw', marks=pytest.mark.slow),
    'row_adam',
    pytest.param('lazy_row_adam', marks=pytest.mark.slow),
    pytest.param('row_adagrad', marks=pytest.mark.slow),
  ],
)
def test_rounding_at_random_keeps_the_mean(value_optimizer):
  before, rounded, _, _ = step(value_optimizer)
  _, nearest, (exact,), _ = step(value_optimizer, value_master=True)
  np.testing.assert_array_equal(nearest, exact.astype(jnp.bfloat16))
  is_read = np.any(exact != before, axis=1)
  assert 0.5 < is_read.mean() < 1
  np.testing.assert_array_equal(rounded[~is_read], before[~is_read])
  exact, rounded = (x[is_read].astype(np.float64) for x in (exact, rounded))
  unit = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 7)
  error = (rounded - exact) / unit
  # To either neighbour, up to 5 deviations of the mean of such roundings.
  assert np.abs(error).max() < 1.01
  assert np.abs(error).max() > 0.9
  assert abs(error.mean()) < 5 * 6**-0.5 / error.size**0.5


@pytest.mark.parametrize(
  ('value_optimizer', 'where'),
  [
    ('row_adam', GRID),
    pytest.param('row_adam', ROWS, marks=pytest.mark.slow),
    pytest.param('lazy_row_adam', GRID, marks=pytest.mark.slow),
    pytest.param('row_adagrad', COLUMNS, marks=pytest.mark.slow),
    pytest.param('adamw', ROWS, marks=pytest.mark.slow),
  ],
)
def test_the_same_numbers_on_every_mesh(value_optimizer, where):
  """But for those that another order of sums rounds to the other side."""
  _, expected, _, metrics = step(value_optimizer)
  _, rounded, _, on_mesh = step(value_optimizer, where)
  for name in ('loss', 'grad_norm'):
    np.testing.assert_allclose(on_mesh[name], metrics[name], rtol=1e-5)
  if value_optimizer != 'adamw':
    rows = 'value_rows_touched'
    assert on_mesh[rows] == metrics[rows]
  assert np.mean(rounded != expected) < 1e-3


def test_validation_reads_what_training_reads():
  loss = step('row_adam')[-1]['loss']
  config = dataclasses.replace(CONFIG, model=MODEL)
  with jax.set_mesh(make_mesh((1, 1, 1))):
    params = first_state(config).params
    run = jax.jit(functools.partial(eval_step, config))
    sums = run(params, evaluation.to_global(make_batch(0)))
  np.testing.assert_allclose(sums['nats'] / sums['targets'], loss, rtol=1e-5)


def test_a_first_step_by_rows_is_the_dense_one():
  """The taps' gradient is the table's, and in the norm; Adam's is the rule."""
  (_, _, (rows,), by_rows), (_, _, (table,), dense) = (
    step(name, value_master=True) for name in ('row_adam', 'adamw')
  )
  # The dense gradient of a bfloat16 table is rounded to its type.
  np.testing.assert_allclose(
    by_rows['grad_norm'], dense['grad_norm'], rtol=1e-3
  )
  np.testing.assert_allclose(rows, table, atol=1e-5)
