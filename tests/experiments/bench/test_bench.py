# SPDX-License-Identifier: Apache-2.0
"""Benches run, on tiny sizes, and their contenders compute the same."""

import argparse
import inspect
import itertools
import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from lanes import few

from jaxsparse.config.errors import UserError
from jaxsparse.experiments.bench import (
  all_benches,
  attention,
  command,
  decode_kernels,
  decode_variants,
  host_memory,
  measuring,
  memory_layer,
  peak_memory,
  quantized_loss,
  serve,
  serve_ratios,
  tables,
  top_m,
  train_step,
  value_bag,
)
from jaxsparse.experiments.bench.report import Report

LAYER = dict(
  tokens=6, model_dim=8, num_keys=8, key_dim=4, num_heads=2, num_selected=4,
  value_dim=6, expansion=4, rounds=1,
)  # fmt: skip
BAG = dict(
  rows=11, width=8, tokens=6, entries=5, cores=1, pools=1, dtype='float32',
  rounds=1,
)  # fmt: skip
STEP = dict(
  config='', optimizers='lazy_row_adam', tokens=4, seq_len=4, num_keys=8,
  growth=4, rounds=1,
)  # fmt: skip


def _flags(options):
  return [f'--{name}={value}' for name, value in options.items()]


def _skip_without_torch(name):
  if 'torch' in name and not measuring.has_torch():
    pytest.skip('torch is not installed')


@pytest.fixture(scope='module')
def problem():
  return memory_layer.make_problem(argparse.Namespace(**LAYER))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['naive jax, top_k', 'naive torch'])
def test_memory_layers_compute_the_same(problem, name):
  _skip_without_torch(name)
  ours = memory_layer.contenders()['jaxsparse'](problem)['forward'].run()
  theirs = memory_layer.contenders()[name](problem)['forward'].run()
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  ('pools', 'cores'),
  few([(4, 2)], itertools.product([1, 4], [1, 2])),
)
def test_bags_compute_the_same(cores, pools):
  options = argparse.Namespace(**BAG | dict(cores=cores, pools=pools))
  passes = value_bag.contenders(options, value_bag._draw(options))
  for contenders in passes:
    (_, first), *others = contenders.items()
    expected = jax.tree.leaves(first.run())
    for _, other in others:
      for a, e in zip(other.run() if len(expected) > 1 else [other.run()],
                      expected, strict=True):  # fmt: skip
        # Torch's forward pass is one that a backward pass may follow.
        a = a.detach() if hasattr(a, 'detach') else a
        a = np.asarray(a).reshape(e.shape)
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5)


def test_best_m_are_the_same():
  options = argparse.Namespace(tokens=3, scores=20, selected=5, rounds=1)
  values = [
    np.asarray(contender.run()[0])
    for contender in top_m.contenders(options).values()
  ]
  for other in values[1:]:
    np.testing.assert_array_equal(values[0], other)


def test_least_bytes_count_distinct_rows_once():
  arrays = dict(
    table=np.zeros((10, 4), np.float32),
    slot=np.array([[1, 1], [1, 7]], np.int32),
    weight=np.zeros((2, 2, 1), np.float32),
    pool=np.zeros((2, 2), np.int32),
    cotangent=np.zeros((2, 1, 4), np.float32),
  )
  forward, backward = value_bag.least_bytes(arrays)
  assert forward == 2 * 16 + 16 + 16 + 32
  assert backward == 2 * forward + 16 + 160


def test_command_prints_a_table_and_writes_json(capsys, tmp_path):
  path = tmp_path / 'bench.json'
  command.main(['value_bag', *_flags(BAG), f'--json={path}'])
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(':')[0] for line in lines[:4]] == [
    'device', 'versions', 'copy bandwidth', 'matmul rate',
  ]  # fmt: skip
  report = json.loads(path.read_text())
  assert report['machine'] == lines[:4]
  assert report['arguments'] == dict(bench='value_bag') | BAG
  assert len(report['results']) == len(lines) - 5
  for record, line in zip(report['results'], lines[5:], strict=True):
    assert record['task'] in line
    assert record['contender'] in line
    rate = record['least_bytes'] / record['seconds']
    assert record['share_of_copy'] == pytest.approx(rate / 1e9)


@pytest.mark.parametrize('num_contenders', few([2], [2, 4]))
def test_memory_layer_tells_times_and_memory(
  capsys, monkeypatch, num_contenders
):
  # One process per contender is for real runs; here its answer is made up.
  monkeypatch.setattr(memory_layer, 'peak_bytes', lambda name, options: 10**6)
  known = itertools.islice(memory_layer.contenders().items(), num_contenders)
  contenders = dict(known)
  monkeypatch.setattr(memory_layer, 'contenders', lambda: contenders)
  command.main(['memory_layer', *_flags(LAYER)])
  lines = capsys.readouterr().out.splitlines()
  for name in contenders:
    for task in memory_layer.PASSES.values():
      (line,) = [line for line in lines if f'{task:<36}{name:<26}' in line]
      assert ' ms' in line
    assert f'{name}: 1 MB of peak memory' in lines


def test_peak_memory_of_one_contender(capsys):
  peak_memory.main(['jaxsparse', *_flags(LAYER)])
  assert int(capsys.readouterr().out) > 10**7


SMALL_RECIPE = """
from jaxsparse import config as c

def get_config():
  memory = c.MemoryConfig(key_dim=8, num_selected=4, placements=((0, 0),))
  return c.Config(model=c.ModelConfig(num_layers=1, memory=memory))
"""


@pytest.mark.slow
def test_train_step_counts_bytes_of_tables_and_their_state(capsys, tmp_path):
  path, recipe = tmp_path / 'bench.json', tmp_path / 'recipe.py'
  recipe.write_text(SMALL_RECIPE)
  flags = _flags(STEP | dict(config=recipe))
  command.main(['train_step', *flags, f'--json={path}'])
  small, large = json.loads(path.read_text())['results']
  assert [small['contender'], large['contender']] == ['1x table', '4x table']
  assert [small['num_values'], large['num_values']] == [64 * 64, 256 * 64]
  for record in (small, large):
    # Value, two moments and little for each row; compiled, the same.
    assert 12 <= record['bytes_per_value'] < 13
    assert record['compiled_bytes_per_value'] == pytest.approx(
      record['bytes_per_value'], rel=0.02
    )


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(config='configs/dense.py:tiny'), 'has no memory layers'),
    (dict(growth=5), '--growth=5 must be a square'),
  ],
)
def test_train_step_refuses_what_it_cannot_do(changes, message):
  options = argparse.Namespace(**STEP | changes)
  with pytest.raises(UserError, match=message):
    train_step.make_config(options, 'adamw', options.growth)


@pytest.mark.slow
def test_attention_tells_sparse_from_dense_and_composed_from_plain(capsys):
  options = argparse.Namespace(
    **attention.OPTIONS
    | dict(
      lengths='40', context=40, train_length=16, heads=2, kv_heads=1, width=8,
      block=8, tile=8, window_blocks=1, kept_blocks=2, chunk=16, model_dim=16,
      train_chunk=8, rounds=1,
    )
  )  # fmt: skip
  records = []
  Report('', {}).add(attention, vars(options), records)
  assert [(r['task'], r['contender']) for r in records] == [
    ('forward 40', 'dense'),
    ('forward 40', 'sparse'),
    ('decode 40', 'dense'),
    ('decode 40', 'sparse'),
    ('train 16', 'plain heads'),
    ('train 16', 'query-wise'),
    ('train 16', 'DCMHA'),
  ]
  # Keys and values of 40 rows, or of four blocks and five summaries.
  least = [r['least_bytes'] for r in records if 'least_bytes' in r]
  assert least == [4 * 2 * 8 * 40, 4 * 2 * 8 * (4 * 8 + 5)]
  assert 'DCMHA' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(lengths='4,x'), 'lengths must be positive numbers'),
    (dict(context=-1), 'context must be at least 0'),
    (dict(heads=0), 'heads must be positive'),
  ],
)
def test_attention_refuses(changes, message):
  options = argparse.Namespace(**attention.OPTIONS | changes)
  with pytest.raises(UserError, match=message):
    list(attention.measure(options))


def test_only_a_gpu_reads_the_memory_of_its_host(capsys):
  assert host_memory.measure(argparse.Namespace(**host_memory.OPTIONS)) == []
  assert 'only a GPU' in capsys.readouterr().out


@pytest.mark.parametrize('name', command.BENCHES)
def test_rows_come_as_they_are_measured(name):
  """No bench keeps rows back: each is a generator of them."""
  bench = command.BENCHES[name]
  one_table = ('top_m', 'host_memory')
  assert name in one_table or inspect.isgeneratorfunction(bench.measure)


def test_each_row_is_printed_and_written_before_the_next(capsys, tmp_path):
  path = tmp_path / 'rows.json'
  report, results, seen = Report(str(path), {}), [], []
  report.content['results'] = results

  def measure(options):
    for i in range(3):
      kept = json.loads(path.read_text() or '{}').get('results', [])
      seen.append((len(kept), capsys.readouterr().out.count('ms')))
      yield dict(task='t', contender=str(i), seconds=1.0, temp_bytes=None)
    raise RuntimeError('out of memory')

  bench = types.SimpleNamespace(measure=measure, show=measuring.print_last)
  with pytest.raises(RuntimeError):
    report.add(bench, {}, results)
  assert seen == [(0, 0), (1, 1), (2, 1)]
  # What comes after a failure is lost, and nothing before it.
  assert [r['contender'] for r in json.loads(path.read_text())['results']] == [
    *'012'
  ]


def test_all_runs_every_bench_and_writes_one_file(tmp_path, monkeypatch):
  sections = [
    ('bag', value_bag, [BAG]),
    ('host', host_memory, [dict(rounds=2), dict(rounds=3)]),
  ]
  known = [bench for _, bench, _ in all_benches.sections()]
  # Those of a server need one, or a workdir; that of tables asks for a disk.
  others = [quantized_loss, serve, serve_ratios, tables]
  # A GPU's alone.
  others += [decode_kernels, decode_variants]
  benches = command.BENCHES.values()
  assert known == [bench for bench in benches if bench not in others]
  for _, bench, runs in all_benches.sections():
    assert all(set(run) <= set(bench.OPTIONS) for run in runs)
  monkeypatch.setattr(all_benches, 'sections', lambda: sections)
  path = tmp_path / 'all.json'
  command.main(['all', f'--json={path}'])
  report = json.loads(path.read_text())['sections']
  assert [run['arguments']['rounds'] for run in report['host']] == [2, 3]
  assert len(report['bag'][0]['results']) > 5


def test_starts_without_packages_for_data():
  """On a machine for measuring there may be nothing to load data with."""
  code = (
    'import sys\n'
    "for name in ('grain', 'tensorflow_datasets'):\n"
    '  sys.modules[name] = None\n'
    'import jaxsparse.experiments.bench.command\n'
  )
  subprocess.run([sys.executable, '-c', code], check=True)
