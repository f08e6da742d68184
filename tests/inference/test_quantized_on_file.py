# SPDX-License-Identifier: Apache-2.0
"""Tables on file, quantized into other files as a model is loaded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from slot_models import MODELS
from small_run import draw_params, save_untrained

from jaxsparse.config.errors import UserError
from jaxsparse.inference import quantized_leaves, weights
from jaxsparse.inference.quantize import Quantization, parse
from jaxsparse.nn.transformer import Transformer
from jaxsparse.ops.tables import host_table
from jaxsparse.run import (
  checkpoint,
  mapped_tables,
  row_steps,
  row_store,
  table_files,
  table_leaves,
)

MODEL = dataclasses.replace(MODELS['small'], vocab_size=257)
NAME = 'block_00/memory/value_table'
BOTH = Quantization(weights='int8', tables='int4', clip_search=True)


@pytest.fixture(scope='module')
def arrays(tmp_path_factory):
  return save_untrained(tmp_path_factory.mktemp('arrays'), MODEL, deviation=0.3)


@pytest.fixture
def on_file(tmp_path, monkeypatch):
  """As a run leaves it that has its table on file: half of it is zeros."""
  # 16 rows in f32.
  monkeypatch.setattr(row_steps, '_STRIPE_BYTES', 16 * 8 * 4)
  rest, tables = table_leaves.split(draw_params(MODEL, 0.3))
  ((name, table),) = tables.items()
  rows = np.array(table)
  rows[len(rows) // 2 :] = 0
  leaf = row_store.Leaf(*rows.shape, 'float32')
  moment = row_store.Leaf(*rows.shape, 'float32')
  leaves = {name: leaf, 'optimizer/m': moment}
  store = row_store.create(table_files.folder_of(tmp_path), leaves)
  store.fill(name, 0, rows[: len(rows) // 2])
  record = {table_leaves.ON_FILE: store.seal(0)}
  store.close()
  checkpoint.save_params(tmp_path, rest, record)
  return tmp_path, table_leaves.joined(rest, {name: jnp.asarray(rows)})


def load(folder, said=(), **options):
  return weights.load(folder, MODEL, say=list(said).append, **options)[1]


def equal(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def written(folder):
  files = sorted((folder / mapped_tables.CONVERTED).rglob('*.rows'))
  return {path: path.stat().st_mtime_ns for path in files}


@pytest.mark.parametrize('how', ['tables=int8', BOTH])
def test_they_are_those_that_memory_has(arrays, how):
  how = parse(how) if isinstance(how, str) else how
  mapped = load(arrays, how=how, tables='file')
  equal(mapped, load(arrays, how=how))
  before = written(arrays)
  (name,) = (p for p in before if how.tables in str(p))
  assert name.name == 'value_table.rows'
  equal(load(arrays, how=how, tables='file'), mapped)
  assert written(arrays) == before


def test_a_run_with_tables_on_file_has_them_quantized_there(
  on_file, monkeypatch
):
  """Some rows at a time; zeros are left out."""
  folder, params = on_file
  how, sizes = parse('tables=int8'), []
  encoded = quantized_leaves.encoded

  def noting(rows, *args):
    sizes.append(len(rows))
    return encoded(rows, *args)

  monkeypatch.setattr(quantized_leaves, 'encoded', noting)
  for where in ('', 'host', 'file'):
    found = load(folder, how=how, tables=where)
  num_rows = len(params['block_00']['memory']['value_table'])
  assert sizes == [16] * (num_rows // 2 // 16)
  equal(found, weights.cast(MODEL, weights.quantize(MODEL, params, how)))


def test_it_is_made_anew_of_another_checkpoint(tmp_path):
  how = parse('tables=int8')
  for deviation in (0.3, 0.5):
    save_untrained(tmp_path, MODEL, deviation)
    found = load(tmp_path, how=how, tables='file')
    equal(found, load(tmp_path, how=how))
    # They hold the store.
    del found
    for path in (tmp_path / 'checkpoints').iterdir():
      path.rename(tmp_path / f'old_{deviation}')


def test_what_is_quantized_is_not_quantized_again(arrays, tmp_path):
  (tmp_path / 'config.json').write_bytes((arrays / 'config.json').read_bytes())
  plain, kinds = quantized_leaves.plain(load(arrays, how=parse('tables=int8')))
  checkpoint.save_params(tmp_path, plain, dict(quantized=kinds))
  with pytest.raises(UserError, match='is quantized already'):
    load(tmp_path, how=BOTH, tables='file')


@pytest.mark.parametrize('is_saved', few([True], [True, False]))
def test_where_a_device_reads_no_files_their_rows_are_fetched(
  arrays, tmp_path, monkeypatch, is_saved
):
  how, folder = parse('tables=int8'), arrays
  if is_saved:
    plain, kinds = quantized_leaves.plain(load(arrays, how=how))
    checkpoint.save_params(tmp_path, plain, dict(quantized=kinds))
    how, folder = None, tmp_path
  tokens = jnp.arange(6)

  def logits(params):
    return Transformer(MODEL).apply({'params': params}, tokens)[0]

  expected = jax.jit(logits)(load(folder, how=how))
  monkeypatch.setattr(host_table, 'reads_host_memory', lambda: False)
  params = load(folder, how=how, tables='file')
  table = params['block_00']['memory']['value_table']
  assert isinstance(table.stored, host_table.HostTable)
  np.testing.assert_array_equal(jax.jit(logits)(params), expected)
