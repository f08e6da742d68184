# SPDX-License-Identifier: Apache-2.0
"""Tables in files: the step of resident ones bit for bit, after any kill."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, make_batch, make_mesh

from jaxsparse.config import TableConfig
from jaxsparse.ops.memory.row_gradient import RowGradient
from jaxsparse.ops.tables import host_table
from jaxsparse.ops.tables.host_table import HostTable
from jaxsparse.run import table_leaves
from jaxsparse.training import evaluation, stored_tables
from jaxsparse.training.optimizer import VALUES, make_row_optimizer
from jaxsparse.training.optimizers.finalizing import state_of
from jaxsparse.training.optimizers.row_updates import apply_updates
from jaxsparse.training.step import (
  TrainState,
  eval_step,
  finalize,
  init_parts,
  optimizer_of,
  rounding_key,
  train_step,
)


def with_store(store, optimizer, table=None, **more):
  memory = dataclasses.replace(
    CONFIG.model.memory,
    query_conv_taps=0,
    placements=((0, 0),),
    table=TableConfig(store=store, **(table or {})),
  )
  return dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, num_layers=1, memory=memory),
    optimizer=dataclasses.replace(
      CONFIG.optimizer, value_optimizer=optimizer, **more
    ),
  )


def same(actual, expected):
  return np.asarray(actual).tobytes() == np.asarray(expected).tobytes()


CASES = {
  'row_adam': dict(optimizer='row_adam'),
  'lazy_row_adam, narrow': dict(
    optimizer='lazy_row_adam',
    table=dict(dtype='bfloat16'),
    value_weight_decay=0.1,
  ),
  'row_adagrad, zeros': dict(optimizer='row_adagrad', table=dict(init='zeros')),
  'row_adam, master': dict(
    optimizer='row_adam', table=dict(dtype='bfloat16'), value_master=True
  ),
  'lazy_row_adam, nothing else': dict(
    optimizer='lazy_row_adam', trained='value_table'
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_steps_are_those_of_resident_tables_bit_for_bit(case, tmp_path):
  resident = with_store('device', **CASES[case])
  config = with_store('file', **CASES[case])
  with jax.set_mesh(make_mesh((1, 1, 1))):
    init = jax.jit(functools.partial(init_parts, resident))
    expected, frozen = init()
    step = jax.jit(functools.partial(train_step, resident), donate_argnums=0)
    tables = stored_tables.of_run(config, tmp_path)
    tables.create(lambda text: None)
    state, beside = jax.jit(tables.init_parts)()
    assert jax.tree.all(jax.tree.map(same, beside, frozen))
    for path, array in tables.arrays().items():
      assert same(array, table_leaves.split(expected.params)[1][path])
    for seed in range(4):
      batch = evaluation.to_global(make_batch(seed))
      expected, told = step(expected, batch, frozen)
      state, metrics = tables.train_step(state, batch, beside)
      assert {k: float(v) for k, v in metrics.items()} == {
        k: float(v) for k, v in told.items()
      }
    rest, of_expected = table_leaves.split(expected.params)
    assert all(jax.tree.leaves(jax.tree.map(same, state.params, rest)))
    for path, array in tables.arrays().items():
      assert same(array, of_expected[path])
    # With what is left for later done in copies, and then in the files.
    done = jax.jit(functools.partial(finalize, resident))(expected)
    for one in (
      tables.finalized(state),
      tables.finalized(tables.finish(state)),
    ):
      assert jax.tree.all(jax.tree.map(same, one.params, done.params))
    tables.seal(4)
    tables._store.verify()
    tables.close()


def test_rows_change_as_those_of_a_resident_table(tmp_path):
  """Three steps of the optimizer alone, each of other rows."""
  config = with_store(
    'file', 'lazy_row_adam', table=dict(init='zeros', dtype='bfloat16')
  )
  tables = stored_tables.of_run(config, tmp_path)
  tables.create(lambda text: None)
  path = 'block_00/memory/value_table'
  params = {path: jnp.zeros((256, 16), jnp.bfloat16)}
  optimizer = make_row_optimizer(config.optimizer, config.train.num_steps)
  of_rows, state = optimizer.init(params), TrainState(
    jnp.int32(0), {}, optimizer_of(config).init({}), None
  )  # fmt: skip

  @jax.jit
  def resident(params, of_rows, gradient, step):
    updates, of_rows = optimizer.update({path: gradient}, of_rows, params)
    return apply_updates(params, updates, rounding_key(config, step)), of_rows

  rng = np.random.default_rng(0)
  for step in range(3):
    slot = np.arange(256, 256 + 64, dtype=np.int32)
    slot[:40] = np.sort(rng.choice(256, 40, replace=False))
    value = rng.normal(size=(64, 16)).astype(np.float32)
    gradient = RowGradient(jnp.asarray(slot), jnp.asarray(value))
    params, of_rows = resident(params, of_rows, gradient, jnp.int32(step))
    state = tables._apply(state, jnp.int32(step), {path: gradient})
    assert same(tables.arrays()[path], params[path])
    assert same(tables.files[f'{path}.nu'].rows, of_rows.nu[path])
  assert state_of(state.opt_state, VALUES).count == 3
  tables.seal(3)
  tables._store.verify()
  tables.close()


@pytest.mark.slow
def test_rows_that_the_host_fetches_give_the_same_steps(tmp_path, monkeypatch):
  """What a GPU does, forced on a CPU."""
  config, found = with_store('file', **CASES['row_adam']), []
  for is_in_place in (True, False):
    monkeypatch.setattr(
      host_table,
      'reads_host_memory',
      lambda: is_in_place,  # noqa: B023
    )
    folder = tmp_path / str(is_in_place)
    folder.mkdir()
    with jax.set_mesh(make_mesh((1, 1, 1))):
      tables = stored_tables.of_run(config, folder)
      tables.create(lambda text: None)
      state, losses = jax.jit(tables.init_parts)()[0], []
      evaluate = jax.jit(functools.partial(eval_step, config))
      for seed in range(3):
        batch = evaluation.to_global(make_batch(seed))
        state, metrics = tables.train_step(state, batch)
        losses.append(float(metrics['loss']))
        nats = evaluate(tables.finalized(state).params, batch)['nats']
        losses.append(float(nats))
      assert evaluate._cache_size() == 1
    assert isinstance(tables.arrays()['block_00/memory/value_table'],
                      jax.Array if is_in_place else HostTable)  # fmt: skip
    found.append(
      (losses, {n: f.rows.tobytes() for n, f in tables.files.items()})
    )
    tables.close()
  assert found[0] == found[1]
