# SPDX-License-Identifier: Apache-2.0
"""Tables of a workdir on file: made once of a checkpoint, and opened after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.config.errors import UserError
from jaxsparse.run import checkpoint, row_store, table_files, table_leaves

PATHS = [
  'block_01/memory/value_table',
  'block_02/memory/value_table/stored',
  'memory/pre_value_table',
]


def draw(seed=0):
  rng = np.random.default_rng(seed)
  return {
    'block_01': {
      'memory': {
        'value_table': jnp.asarray(rng.normal(size=(300, 8)), jnp.bfloat16),
        'query': jnp.asarray(rng.normal(size=(4, 2)), jnp.float32),
      }
    },
    # As a quantized table is saved.
    'block_02': {
      'memory': {
        'value_table': {
          'stored': jnp.asarray(rng.integers(0, 256, (9, 16)), jnp.uint8)
        },
        'query': jnp.ones(3),
      }
    },
    # A module of nothing else.
    'memory': {'pre_value_table': jnp.asarray(rng.normal(size=(20, 4)))},
    'embed': {'table': jnp.ones((5, 4))},
  }


def equal(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(folder, params, step=3):
  checkpoints = checkpoint.Checkpoints(folder, keep=2)
  checkpoints.save(step, params, {'step': jnp.int32(step)}, {})
  checkpoints.close()


def load(folder, said=None, **options):
  said = [] if said is None else said
  return checkpoint.load_params(folder, say=said.append, **options)[1]


def test_split_is_undone():
  params = draw()
  rest, tables = table_leaves.split(params)
  assert sorted(tables) == PATHS
  assert 'memory' not in rest
  equal(table_leaves.joined(rest, tables), params)


def test_a_checkpoint_of_arrays_is_written_once_and_then_mapped(tmp_path):
  params, said = draw(), []
  save(tmp_path, params)
  equal(load(tmp_path, said, tables='file'), params)
  assert len(said) == 1
  assert 'mapped_tables/3' in said[0]
  files = sorted((tmp_path / 'mapped_tables').rglob('*'))
  before = [p.stat().st_mtime_ns for p in files]
  found = load(tmp_path, said, tables='file')
  equal(found, params)
  assert len(said) == 1
  assert [p.stat().st_mtime_ns for p in files] == before
  store = row_store.open_at(tmp_path / 'mapped_tables/3', 3)
  store.verify()
  for tables in ('', 'host', 'device'):
    equal(load(tmp_path, said, tables=tables), params)


def test_tables_of_another_checkpoint_are_not_taken(tmp_path):
  save(tmp_path, draw())
  load(tmp_path, tables='file')
  for path in (tmp_path / 'checkpoints').iterdir():
    path.rename(tmp_path / 'old')
  save(tmp_path, draw(1))
  equal(load(tmp_path, tables='file'), draw(1))


def test_tables_that_a_run_has_on_file_are_read_where_they_lie(tmp_path):
  rest, tables = table_leaves.split(draw())
  leaves = {
    n: row_store.Leaf(*x.shape, str(x.dtype)) for n, x in tables.items()
  }
  store = row_store.create(table_files.folder_of(tmp_path), leaves)
  for name, x in tables.items():
    store.fill(name, 0, np.asarray(x))
  record = {table_leaves.ON_FILE: store.seal(3)}
  store.close()
  checkpoints = checkpoint.Checkpoints(tmp_path, keep=2)
  checkpoints.save(3, rest, {'step': jnp.int32(3)}, record)
  checkpoints.close()
  for where in ('', 'file', 'host', 'device'):
    equal(load(tmp_path, tables=where), draw())
  # A store of the same step, but of another run.
  store = row_store.create(table_files.folder_of(tmp_path), leaves)
  store.seal(3)
  store.close()
  with pytest.raises(UserError, match='are not those of the checkpoint'):
    load(tmp_path)
