# SPDX-License-Identifier: Apache-2.0
"""Deltas of rows are listed, merged, added to a workdir and removed again."""

import shutil

import jax
import numpy as np
import pytest
from commands import exit_code
from small_run import save_untrained

from jaxsparse.config import MemoryConfig, ModelConfig
from jaxsparse.nn import row_deltas
from jaxsparse.run import adapter_files, checkpoint, stored

MODEL = ModelConfig(
  num_layers=1, model_dim=8, num_heads=1, num_kv_heads=1, head_dim=8,
  mlp_dim=8, vocab_size=257,
  memory=MemoryConfig.peer(
    num_keys=6, key_dim=4, num_heads=1, num_selected=4, value_dim=8,
    pre_value_dim=8, placements=((0, 0),),
  ),
)  # fmt: skip
PATHS = [f'block_00/memory/{name}_table' for name in ('pre_value', 'value')]
ROWS = dict(
  facts=np.array([0, 5, 9], np.int32),
  news=np.array([1, 5, 35], np.int32),
  names=np.array([2, 30], np.int32),
)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  return save_untrained(tmp_path_factory.mktemp('base'), MODEL, deviation=0.3)


@pytest.fixture(scope='module')
def adapters(base):
  """Three, of which the first two have a row in common."""
  rng = np.random.default_rng(0)
  for name, rows in ROWS.items():
    tensors = {}
    for path in PATHS:
      values = rng.normal(size=(len(rows), 8)).astype(np.float32)
      tensors |= {f'{path}/rows': rows, f'{path}/values': values}
      tensors[f'{path}/old_norm'] = np.ones(len(rows), np.float32)
    adapter_files.write(
      adapter_files.folder_of(base, name),
      tensors,
      dict(kind='rows', base=stored.params_fingerprint(base, 3), text='x.txt'),
    )
  return {name: str(adapter_files.folder_of(base, name)) for name in ROWS}


def run(*argv):
  return exit_code(['adapters', *map(str, argv)])


def params_of(workdir):
  return checkpoint.load_params(workdir)[1]


def equal(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_they_are_listed_and_inspected(base, adapters, capsys):
  assert run('list', base) == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(':')[0] for line in lines] == ['facts', 'names', 'news']
  assert 'rows, 6 rows of 2 tables' in lines[0]
  assert run('inspect', adapters['facts'], adapters['news']) == 0
  said = capsys.readouterr().out
  assert f'{PATHS[0]}: 3 rows, 0 to 9, of float32' in said
  assert '100.0% of the rows changed by over 1% of their norm' in said
  assert 'text: x.txt' in said
  assert f'1 rows of {PATHS[1]} are changed by several' in said
  run('inspect', adapters['facts'], adapters['names'])
  assert 'No row is changed by several.' in capsys.readouterr().out


def test_what_is_added_is_removed_to_the_bit(base, adapters, tmp_path, capsys):
  both, one, none = (tmp_path / name for name in ('both', 'one', 'none'))
  folders = adapters['facts'], adapters['news'], adapters['names']
  assert run('add', base, *folders, f'--out={both}') == 0
  said = capsys.readouterr().out
  assert f'1 rows of {PATHS[0]} are changed by facts and by news' in said
  before, after = params_of(base), params_of(both)
  for path in PATHS:
    tables = [row_deltas.tables(x)[path] for x in (before, after)]
    is_changed = np.any(np.asarray(tables[0]) != np.asarray(tables[1]), axis=1)
    everywhere = np.unique(np.concatenate([*ROWS.values()]))
    assert np.flatnonzero(is_changed).tolist() == everywhere.tolist()
  assert run('list', both) == 0
  said = capsys.readouterr().out
  assert [line.split(':')[0] for line in said.splitlines()] == list(ROWS)
  # The later one of two that share rows goes first.
  assert run('remove', both, 'facts', f'--out={one}') == 2
  assert "remove 'news' first" in capsys.readouterr().err
  assert run('remove', both, 'news', f'--out={one}') == 0
  assert run('remove', one, 'facts', f'--out={tmp_path / "names"}') == 0
  assert run('remove', tmp_path / 'names', 'names', f'--out={none}') == 0
  equal(params_of(none), before)
  assert run('list', none) == 2


def test_merged_deltas_do_what_both_do(base, adapters, tmp_path, capsys):
  merged, one, other = (tmp_path / x for x in ('merged', 'one', 'other'))
  folders = adapters['facts'], adapters['names']
  assert run('merge', *folders, f'--out={merged}') == 0
  capsys.readouterr()
  assert run('inspect', merged) == 0
  said = capsys.readouterr().out
  assert '100.0% of the rows changed by over 1% of their norm' in said
  assert run('add', base, merged, f'--out={one}') == 0
  assert run('add', base, *folders, f'--out={other}') == 0
  equal(params_of(one), params_of(other))


def test_a_delta_in_int8_is_a_quarter_and_nearly_the_same(
  base, adapters, tmp_path, capsys
):
  small, out = tmp_path / 'small', tmp_path / 'out'
  assert run('merge', adapters['facts'], '--values=int8', f'--out={small}') == 0
  assert run('inspect', small) == 0
  assert f'{PATHS[0]}: 3 rows, 0 to 9, of int8' in capsys.readouterr().out
  whole, _ = adapter_files.read(adapters['facts'])
  tensors, meta = adapter_files.read(small)
  assert run('add', base, small, f'--out={out}') == 0
  for path in PATHS:
    values = whole[f'{path}/values']
    assert tensors[f'{path}/values'].nbytes == values.nbytes / 4
    before, after = (
      np.asarray(row_deltas.tables(params_of(x))[path]) for x in (base, out)
    )
    most = np.abs(values).max(axis=1, keepdims=True) / 254
    error = np.abs(after - before)[ROWS['facts']] - np.abs(values)
    assert (np.abs(error) < most + 1e-6).all()
  # Back in floats it is what it has become.
  again = tmp_path / 'again'
  assert run('merge', small, f'--out={again}') == 0
  found, _ = adapter_files.read(again)
  assert found[f'{PATHS[0]}/values'].dtype == np.float32
  del tensors[f'{PATHS[0]}/scale'], tensors[f'{PATHS[0]}/old_norm']
  adapter_files.write(small, tensors, meta)
  assert run('add', base, small, f'--out={tmp_path / "x"}') == 2
  assert "of int8 a 'scale' of each row" in capsys.readouterr().err


def test_one_is_added_once(base, adapters, tmp_path, capsys):
  """Whatever its copy is called."""
  facts, copy = adapters['facts'], tmp_path / 'copy'
  shutil.copytree(facts, copy)
  out = f'--out={tmp_path / "out"}'
  for again, same in ((facts, 'named twice'), (copy, f'that in {facts!r}')):
    assert run('merge', facts, adapters['names'], again, out) == 2
    said = capsys.readouterr().err
    assert f'in {str(again)!r} is {same}' in said
    assert 'name it once' in said
    assert run('add', base, facts, again, out) == 2
    assert "in the tables already, as 'facts'" in capsys.readouterr().err
  assert run('add', base, facts, out) == 0
  more = f'--out={tmp_path / "more"}'
  assert run('add', tmp_path / 'out', copy, more) == 2
  assert "in the tables already, as 'facts'" in capsys.readouterr().err


def test_others_are_refused(base, adapters, tmp_path, capsys):
  folder, out = tmp_path / 'strange', f'--out={tmp_path / "out"}'
  tensors, meta = adapter_files.read(adapters['names'])
  adapter_files.write(folder, tensors, meta | dict(base='0' * 64))
  assert run('add', base, folder, out) == 2
  assert 'was trained beside other parameters' in capsys.readouterr().err
  assert run('add', base, folder, out, '--force') == 0
  assert run('merge', folder, adapters['facts'], '--out=x') == 2
  assert 'must be of one base' in capsys.readouterr().err
  assert run('remove', base, 'names', out) == 2
  assert 'which has none' in capsys.readouterr().err
  adapter_files.write(
    tmp_path / 'lora', {'x/a': np.ones(3, np.float32)}, meta | dict(kind='lora')
  )
  assert run('add', base, tmp_path / 'lora', out) == 2
  assert "is of the kind 'lora'" in capsys.readouterr().err
  assert run('ad') == 2
  assert 'did you mean' in capsys.readouterr().err
