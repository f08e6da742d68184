# SPDX-License-Identifier: Apache-2.0
"""What is measured on a lent GPU, rehearsed whole at toy sizes."""

import argparse
import json
import math
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from jaxsparse.config.errors import UserError
from jaxsparse.experiments.bench import (
  command,
  decode,
  decode_cell,
  decode_models,
  gpu,
  language,
  measuring,
)
from jaxsparse.experiments.bench.report import Report

# Packages for data that a lent machine does not have.
HIDDEN = ('grain', 'tensorflow_datasets', 'ml_collections', 'array_record')


@pytest.fixture
def text(tmp_path):
  path = tmp_path / 'text.txt'
  path.write_bytes(b'It is the same text again and again. ' * 1200)
  return path


def _run(item, tmp_path, *flags):
  path = tmp_path / 'gpu.json'
  flags = [f'--json={path}', '--sizes=toy', *flags]
  command.main(['gpu', item, *flags])
  return json.loads(path.read_text())


def test_all_items_can_be_planned():
  for item in gpu.ITEMS:
    for sizes in ('gpu', 'toy'):
      options = gpu.OPTIONS | dict(sizes=sizes)
      for _, bench, runs in gpu.sections(item, options):
        assert all(set(run) <= set(bench.OPTIONS) for run in runs)


SMALL_SUITE = """
from jaxsparse import config as c
from jaxsparse.experiments.compare.suite import Architecture, Suite

def get_suite():
  model = c.ModelConfig(
    num_layers=1, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
    mlp_dim=16, vocab_size=257,
  )
  base = c.Config(model=model, data=c.DataConfig(seq_len=16, batch_size=8))
  return Suite(base=base, architectures=dict(dense=Architecture()))
"""


def test_language_trains_on_a_given_text(tmp_path, text, capsys, monkeypatch):
  suite = tmp_path / 'suite.py'
  suite.write_text(SMALL_SUITE)
  toy = {language: dict(suite=str(suite), steps=2)}
  monkeypatch.setattr(gpu, '_TOY', toy)
  report = _run('language', tmp_path, f'--text={text}', '--models=dense')
  printed = capsys.readouterr().out.splitlines()
  assert [line.split(':')[0] for line in printed[:4]] == [
    'device', 'versions', 'copy bandwidth', 'matmul rate',
  ]  # fmt: skip
  assert report['machine'] == printed[:4]
  ((run,),) = report['sections'].values()
  (row,) = run['results']
  assert row['contender'] == 'dense'
  assert row['num_tokens'] == 2 * 8 * 16
  # Of bytes, at the start.
  assert row['validation_loss'] == pytest.approx(math.log(257), rel=0.1)
  assert row['bits_per_byte'] == pytest.approx(
    row['validation_loss'] / math.log(2)
  )


def test_language_ends_between_models(tmp_path, text, monkeypatch, capsys):
  """What was trained stays when minutes are over, or when a model fails."""

  def fake_train(config, programs, text, end):
    if config == 'fails':
      raise error
    now[0] += 200
    return dict(validation_loss=1.0)

  error = jax.errors.JaxRuntimeError('out of memory')
  now = [0.0]
  configs = dict(first='a', bad='fails', second='b', third='c')
  base = types.SimpleNamespace(
    data=types.SimpleNamespace(batch_size=1, seq_len=1),
    train=types.SimpleNamespace(num_steps=1),
  )
  found = language.Text(np.zeros(4), np.zeros(4), 'digest')
  programs = language.Programs(None, None, None)
  fakes = dict(
    make_configs=lambda options: configs | dict(first=base),
    read_text=lambda paths, config: found,
    _compile=lambda config: programs,
    _train=fake_train,
    time=types.SimpleNamespace(monotonic=lambda: now[0]),
  )
  for name, fake in fakes.items():
    monkeypatch.setattr(language, name, fake)
  options = argparse.Namespace(**language.OPTIONS | dict(minutes=9.0))
  names = [row['contender'] for row in language.measure(options)]
  assert names == ['first', 'second']
  printed = capsys.readouterr().out
  assert 'bad: failed: out of memory' in printed
  assert 'third: left out, as 2.3 minutes are left' in printed


def test_batches_are_the_same_for_all_and_every_epoch_reads_all():
  data = types.SimpleNamespace(batch_size=2, seq_len=5)
  config = types.SimpleNamespace(data=data)
  tokens = np.arange(31).astype(np.uint16)
  drawn = language.batches(tokens, config, seed=3)
  epoch = [next(drawn) for _ in range(3)]
  rows = np.concatenate([batch['tokens'] for batch in epoch])
  np.testing.assert_array_equal(np.sort(rows.flatten()), np.arange(30))
  for batch in epoch:
    np.testing.assert_array_equal(batch['targets'], batch['tokens'] + 1)
  again = next(language.batches(tokens, config, seed=3))
  np.testing.assert_array_equal(epoch[0]['tokens'], again['tokens'])


def test_texts_are_read_plain_and_compressed(tmp_path):
  import gzip

  config = types.SimpleNamespace(
    data=types.SimpleNamespace(
      validation_fraction=0.25, batch_size=1, seq_len=2
    )
  )
  content = b'some text' * 4
  plain, packed = tmp_path / 'a.txt', tmp_path / 'a.gz'
  plain.write_bytes(content)
  packed.write_bytes(gzip.compress(content))
  texts = [language.read_text(str(p), config) for p in (plain, packed)]
  assert texts[0].digest == texts[1].digest
  tokens = np.concatenate([texts[1].train, texts[1].validation])
  assert tokens.tolist() == [*content, 256]
  config.data.batch_size = 50
  with pytest.raises(UserError, match='validation part of more than a batch'):
    language.read_text(str(plain), config)


def test_what_fails_leaves_out_itself_alone(tmp_path, capsys):
  def measure(options):
    yield dict(task='t', contender='c', seconds=1.0, temp_bytes=None)
    if options.fails:
      raise RuntimeError('out of memory')

  bench = types.SimpleNamespace(
    OPTIONS=dict(fails=False), measure=measure, show=measuring.print_last
  )
  path = tmp_path / 'failed.json'
  report = Report(str(path), {})
  found = [('one', bench, [dict(fails=True), {}]), ('two', bench, [{}])]
  with pytest.raises(UserError, match='failed: one; all else was measured'):
    gpu.run(found, report, 9.0, time.monotonic())
  (failed, fine), (other,) = json.loads(path.read_text())['sections'].values()
  assert failed['error'] == 'RuntimeError: out of memory'
  assert [len(one['results']) for one in (failed, fine, other)] == [1, 1, 1]
  gpu.run(found, report, 0.0, time.monotonic())
  assert 'two: left out, the 0 minutes are over' in capsys.readouterr().out


def test_one_sequence_as_two_rows_is_repeated(monkeypatch):
  monkeypatch.setattr(
    decode_cell, 'compile_decode', lambda lowered, options: None
  )
  toy = decode.OPTIONS | gpu._TOY[decode]
  options = argparse.Namespace(**toy | dict(models='dense', least_rows=2))
  model = decode_models.make_models(options, 2)['dense']
  params = {'dense': decode_models.draw_params(model)}
  cell = decode_cell.Cell({'dense': model}, params, options, 1)
  assert cell._tokens.shape == (toy['steps'], 2)
  np.testing.assert_array_equal(cell._tokens[:, 0], cell._tokens[:, 1])
  for x in jax.tree.leaves(cell._keys):
    if x.ndim:
      np.testing.assert_array_equal(x[0], x[1])
  key = cell._keys['blocks']['block_00']['attention']['key']
  assert len(np.unique(key[0])) > key[0].size / 2


def test_sizes_that_there_are_not_are_refused():
  with pytest.raises(UserError, match="--sizes must be gpu or toy, got 'big'"):
    command.main(['gpu', 'rows', '--sizes=big'])


@pytest.mark.slow
@pytest.mark.parametrize('item', gpu.ITEMS)
def test_items_run_whole_without_packages_for_data(item, tmp_path, text):
  path = tmp_path / 'gpu.json'
  code = (
    'import sys\n'
    f'for name in {HIDDEN}:\n'
    '  sys.modules[name] = None\n'
    'from jaxsparse.cli.command import main\n'
    f"main(['bench', 'gpu', {item!r}, '--sizes=toy', '--minutes=60', "
    f"'--text={text}', '--json={path}'])\n"
  )
  done = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr
  sections = json.loads(path.read_text())['sections']
  names = [title for title, _, runs in gpu.sections(item, gpu.OPTIONS) if runs]
  for name in names:
    for one in sections[name]:
      assert 'error' not in one
      assert one['results'] or name == 'gather from pinned host memory'
  if item == 'language':
    rows = sections['language'][0]['results']
    assert [row['contender'] for row in rows] == gpu.OPTIONS['models'].split(
      ','
    )
    assert len({row['batches'] for row in rows}) == 1
    flops = [row['flops_per_token'] for row in rows]
    assert max(flops) / min(flops) < 1.02
