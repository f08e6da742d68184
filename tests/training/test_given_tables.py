# SPDX-License-Identifier: Apache-2.0
"""Tables in files begin with the rows of another checkpoint."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference.small_run import draw_params, save_untrained
from small_model import Batches, make_mesh

from jaxsparse import config as c
from jaxsparse.config import saved_config
from jaxsparse.run import (
  checkpoint,
  new_workdir,
  start,
  table_files,
  table_leaves,
)
from jaxsparse.run.progress import Reporter
from jaxsparse.training import evaluation, loop, start_from, stored_tables

MODEL = c.ModelConfig(
  num_layers=1, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4,
  mlp_dim=8, vocab_size=257,
)  # fmt: skip
MEMORY = c.MemoryConfig(
  num_keys=8, key_dim=4, num_selected=4, value_dim=8, placements=((0, 0),),
  replaces_mlp=False,
)  # fmt: skip


def with_store(store, start_from='', **memory):
  table = c.TableConfig(store=store)
  layer = dataclasses.replace(MEMORY, table=table, **memory)
  return c.Config(
    model=dataclasses.replace(MODEL, memory=layer),
    data=c.DataConfig(batch_size=2, seq_len=16),
    optimizer=c.OptimizerConfig(
      warmup_steps=1, value_optimizer='lazy_row_adam'
    ),
    train=c.TrainConfig(
      num_steps=4,
      save_every=2,
      keep_checkpoints=2,
      log_every=1,
      start_from=start_from,
    ),
  )


def first_params(config, workdir):
  """The parameters with which a run begins another's, tables and all."""
  workdir.mkdir()
  with jax.set_mesh(make_mesh((1, 1, 1))):
    found = start.settled(config, workdir)
    params = start_from.load_params(config, found, print)
    tables = stored_tables.of_run(config, workdir)
    if tables is None:
      return params
    assert not table_leaves.split(params)[1]
    tables.create(print, start_from.given_tables(found))
    return table_leaves.joined(params, tables.arrays())


def equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
  ('has_memory', 'output_map'),
  [
    (True, True),
    (False, False),
    pytest.param(True, False, marks=pytest.mark.slow),
    pytest.param(False, True, marks=pytest.mark.slow),
  ],
)
def test_rows_are_those_that_resident_tables_begin_with(
  tmp_path, has_memory, output_map
):
  """Read where the other run has them, and drawn or zeros where it has none."""
  old, wide = tmp_path / 'old', dict(output_map=output_map)
  if not output_map:
    wide |= dict(value_dim=8)
  old.mkdir()
  config = with_store('device', str(old), **wide)
  save_untrained(old, config.model if has_memory else MODEL, 0.3)
  expected = first_params(config, tmp_path / 'resident')
  on_file = with_store('file', str(old), **wide)
  found = first_params(on_file, tmp_path / 'on_file')
  equal(found, expected)
  table = found['block_00']['memory']['value_table']
  assert bool(np.any(table)) == (has_memory or output_map)


def test_rows_are_read_from_the_files_of_another_run(tmp_path):
  given = tmp_path / 'given'
  given.mkdir()
  config = with_store('file')
  params = draw_params(config.model, 0.3)
  rest, of_params = table_leaves.split(params)
  (given / 'config.json').write_text(saved_config.to_json(config))
  with jax.set_mesh(make_mesh((1, 1, 1))):
    tables = stored_tables.of_run(config, given)
    rows = {name: lambda x=x: np.asarray(x) for name, x in of_params.items()}
    tables.create(print, stored_tables.Given(rows), 3)
    checkpoints = checkpoint.Checkpoints(given, keep=1)
    checkpoints.save(3, rest, {'step': jnp.int32(3)}, tables.seal(3))
    checkpoints.close()
    tables.close()
  config = with_store('file', str(given))
  equal(first_params(config, tmp_path / 'new'), params)


class Killed(Batches):
  """As if the process ended while it waits for a batch."""

  def __next__(self):
    if self.step == 3:
      raise KeyboardInterrupt
    return super().__next__()


@pytest.mark.slow
def test_given_parameters_train_as_with_resident_tables(tmp_path, monkeypatch):
  """An import, killed after its first checkpoint, too."""
  monkeypatch.setattr(
    evaluation, 'validate', lambda *_, **__: evaluation.Validation(1, 1, {})
  )

  def fit(config, workdir, batches=Batches):
    data = loop.TrainingData(batches(), list, 1, 1.0)
    with jax.set_mesh(make_mesh((1, 1, 1))):
      loop.fit(config, workdir, data, Reporter(), lambda _: None)

  for store in ('device', 'file'):
    config = with_store(store)
    (tmp_path / store).mkdir()
    params = draw_params(config.model, 0.3)
    new_workdir.write(tmp_path / store, config, params, {'from': 'elsewhere'})
    if store == 'file':
      with pytest.raises(KeyboardInterrupt):
        fit(config, tmp_path / store, Killed)
    fit(config, tmp_path / store)

  def of(store, step):
    return checkpoint.load_params(tmp_path / store, step)[1]

  equal(of('file', 4), of('device', 4))
  equal(of('file', 0), params)
  # What the given step is of has its own tables: the store forgets it.
  steps = tmp_path / 'file' / table_files.TABLES / 'steps'
  assert sorted(int(p.stem) for p in steps.iterdir()) == [2, 4]
  # Both later checkpoints are damaged: it begins again.
  for step in (2, 4):
    shutil.rmtree(
      tmp_path / 'file' / 'checkpoints' / str(step) / 'params' / 'd'
    )
  fit(with_store('file'), tmp_path / 'file')
  equal(of('file', 4), of('device', 4))
