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
from jaxsparse.training.fetched_rows import collected
from jaxsparse.training.language import eval_step
from jaxsparse.training.optimizer import VALUES, make_row_optimizer
from jaxsparse.training.optimizers.finalizing import state_of
from jaxsparse.training.optimizers.row_updates import apply_updates
from jaxsparse.training.step import (
  TrainState,
  finalize,
  init_parts,
  optimizer_of,
  rounding_key,
  train_step,
)
from jaxsparse.training.table_step import TableGradients


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


def close(actual, expected):
  return np.allclose(actual, expected, rtol=0, atol=3e-7)


def rows_of(x):
  """The array, or the rows of what stands for one."""
  return x.source.rows if isinstance(x, HostTable) else x


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
  'row_adam, in passes': dict(optimizer='row_adam', value_row_budget=20),
}
ONE = (1, 1, 1)
# A CPU's compiler joins product and sum of these updates in one program only.
ROUNDED = ('row_adagrad, zeros', 'lazy_row_adam, nothing else')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('case', 'shape'),
  [*((case, ONE) for case in CASES), ('row_adam', (2, 1, 1))],
)
def test_steps_are_those_of_resident_tables_bit_for_bit(case, shape, tmp_path):
  resident = with_store('device', **CASES[case])
  config = with_store('file', **CASES[case])
  alike = close if case in ROUNDED else same
  with jax.set_mesh(make_mesh(shape)):
    init = jax.jit(functools.partial(init_parts, resident))
    expected, frozen = init()
    step = jax.jit(functools.partial(train_step, resident), donate_argnums=0)
    tables = stored_tables.of_run(config, tmp_path)
    tables.create(lambda text: None)
    state, beside = jax.jit(tables.init_parts)()
    assert jax.tree.all(jax.tree.map(same, beside, frozen))
    for path, x in table_leaves.split(expected.params)[1].items():
      assert same(tables.files[path].rows, x)
    for seed in range(4):
      batch = evaluation.to_global(make_batch(seed))
      expected, told = step(expected, batch, frozen)
      state, metrics = tables.train_step(state, batch, beside)
      assert {k: float(v) for k, v in metrics.items()} == {
        k: float(v) for k, v in told.items()
      }
    rest, of_expected = table_leaves.split(expected.params)
    assert all(jax.tree.leaves(jax.tree.map(alike, state.params, rest)))
    for path, x in of_expected.items():
      assert alike(tables.files[path].rows, x)
    # With what is left for later done in copies, and then in the files.
    done = jax.jit(functools.partial(finalize, resident))(expected)
    for one in (
      tables.finalized(state),
      tables.finalized(tables.finish(state)),
    ):
      for part, wanted in zip(
        *map(table_leaves.split, (one.params, done.params)), strict=True
      ):
        assert jax.tree.all(
          jax.tree.map(
            lambda x, y: alike(rows_of(x), y),
            part,
            wanted,
            is_leaf=lambda x: isinstance(x, HostTable),
          )
        )
    tables.seal(4)
    tables._store.verify()
    tables.close()


@pytest.mark.slow
@pytest.mark.parametrize('scheme', ['columns', 'grid'])
def test_on_any_mesh_the_losses_are_those_of_resident_tables(scheme, tmp_path):
  """Devices with some columns add up gradients of weights in other orders."""
  case = dict(
    optimizer='row_adam', table=dict(scheme=scheme), value_row_budget=20
  )
  resident, config = (with_store(s, **case) for s in ('device', 'file'))
  with jax.set_mesh(make_mesh((2, 2, 2))):
    expected, _ = jax.jit(functools.partial(init_parts, resident))()
    step = jax.jit(functools.partial(train_step, resident), donate_argnums=0)
    tables = stored_tables.of_run(config, tmp_path)
    tables.create(lambda text: None)
    state, _ = jax.jit(tables.init_parts)()
    for seed in range(2):
      batch = evaluation.to_global(make_batch(seed))
      expected, told = step(expected, batch)
      state, metrics = tables.train_step(state, batch)
      for name in ('loss', 'grad_norm'):
        np.testing.assert_allclose(metrics[name], told[name], rtol=1e-6)
      assert metrics['value_rows_touched'] == told['value_rows_touched']
      assert metrics['value_rows_over_budget'] > 0
    for path, x in table_leaves.split(expected.params)[1].items():
      np.testing.assert_allclose(tables.files[path].rows, x, atol=1e-5)
    tables.seal(2)
    tables._store.verify()
    tables.close()


def test_pieces_of_a_gradient_are_put_together():
  """Two pieces of 8 rows, with 2 and 3 of 4 entries in use."""
  sharding = jax.sharding.NamedSharding(make_mesh((2, 1, 1)), jax.P('data'))
  slot = np.array([1, 6, 8, 9, 0, 2, 7, 8], np.int32)
  value = np.arange(8, dtype=np.float32)[:, None]
  gradient = RowGradient(*(jax.device_put(x, sharding) for x in (slot, value)))
  ids, size, found = collected(gradient, 16, 2)
  assert ids.tolist() == [1, 6, 8, 10, 15]
  assert found.slot.tolist() == [*ids, 21, 22, 23][:size]
  assert found.value[:, 0].tolist() == [0, 1, 4, 5, 6, 0, 0, 0][:size]


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
    state = tables._apply(
      state, jnp.int32(step), TableGradients({path: gradient}, None)
    )
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
