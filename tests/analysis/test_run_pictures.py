# SPDX-License-Identifier: Apache-2.0
"""Pictures from what a run leaves, and `python -m jaxsparse report`."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import exit_code
from pictures import figures, texts

from jaxsparse.analysis import run_pictures
from jaxsparse.cli import report
from jaxsparse.config import Config, MemoryConfig, ModelConfig, saved_config


@pytest.fixture
def workdir(tmp_path):
  """Of a dense model: one picture."""
  (tmp_path / 'config.json').write_text(saved_config.to_json(Config()))
  write_metrics(tmp_path, {})
  return tmp_path


def write_metrics(workdir, of_layers):
  lines = (
    json.dumps({'step': step, 'loss': 3 - step / 10} | of_layers) + '\n'
    for step in range(1, 5)
  )
  (workdir / 'metrics.jsonl').write_text(''.join(lines))


def test_report_draws_what_there_is(workdir, capsys):
  assert exit_code(['report', str(workdir)]) == 0
  of_layers = {
    'block_00/moe/usage_max': 1.5,
    'block_00/moe/usage_kl': 0.1,
    'block_01/memory/usage_fraction': 0.5,
    'block_01/memory/usage_kl': 1.0,
    'block_02/attention/kept_share': 0.3,
    'block_02/attention/router_entropy': 2.0,
  }
  write_metrics(workdir, of_layers)
  counts = {
    'block_00 experts': np.array([5, 1, 0, 2]),
    'block_01': np.array([0, 3, 1, 0, 9]),
  }
  run_pictures.save_pass(workdir, counts, {'gzip': 2.6})
  assert exit_code(['report', str(workdir)]) == 0
  names = {line.split('/')[-1] for line in capsys.readouterr().out.split()}
  assert names == {
    'training.png',
    'slot_usage.png',
    'expert_load.png',
    'sparse_attention.png',
  }
  for name in names:
    data = (workdir / 'plots' / name).read_bytes()
    assert data.startswith(b'\x89PNG')
    assert len(data) > 10_000


def test_slots_are_those_of_a_placement(workdir, tmp_path, monkeypatch):
  memory = MemoryConfig(placements=((1, 3), (2, 2)))
  config = Config(model=ModelConfig(memory=memory))
  (workdir / 'config.json').write_text(saved_config.to_json(config))
  counts = {'block_01': np.array([0, 3]), 'block_02': np.array([1, 3])}
  run_pictures.save_pass(workdir, counts, {})
  written = figures(monkeypatch)
  assert exit_code(['report', str(workdir)]) == 0
  said = '\n'.join(text for figure in written for text in texts(figure))
  assert 'memory of block 1, added after block 3: 50.0% used' in said
  assert 'memory of block 2: 100.0% used' in said


def test_a_workdir_for_reading_only(workdir, tmp_path_factory, capsys):
  """Pictures go where they are told to, and nothing into the workdir."""
  (workdir / 'plots').write_text('no folder, as nobody may make one')
  before = sorted(workdir.rglob('*'))
  assert exit_code(['report', str(workdir)]) == 2
  said = capsys.readouterr()
  assert said.out == ''
  assert said.err.count('\n') == 1
  assert 'plots' in said.err
  assert '--output=FOLDER' in said.err
  output = tmp_path_factory.mktemp('out') / 'of' / 'run'
  assert exit_code(['report', str(workdir), f'--output={output}']) == 0
  names = capsys.readouterr().out.split()
  assert f'{output}/training.png' in names
  assert sorted(map(str, output.iterdir())) == sorted(names)
  assert sorted(workdir.rglob('*')) == before


def test_without_a_run_it_is_one_sentence(tmp_path, capsys):
  assert exit_code(['report', str(tmp_path)]) == 2
  (tmp_path / 'config.json').write_text(saved_config.to_json(Config()))
  assert exit_code(['report', str(tmp_path)]) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert 'holds no config.json' in lines[0]
  assert 'holds no metrics yet' in lines[1]


def test_what_was_brought_in_can_be_looked_at(tmp_path, capsys, monkeypatch):
  (tmp_path / 'config.json').write_text(saved_config.to_json(Config()))
  monkeypatch.setattr(report, 'draw_attention', lambda *_: [Path('a.png')])
  assert exit_code(['report', str(tmp_path), '--attention=a text']) == 0
  assert capsys.readouterr().out == f'{tmp_path}/plots/a.png\n'


def no_zip(path):
  path.write_bytes(b'PK nothing of the kind')


def cut(path):
  path.write_bytes(path.read_bytes()[:-60])


def folder(path):
  path.unlink()
  path.mkdir()


def objects(path):
  np.savez(path, **{'counts/block_01': np.array([{}, []], object)})


def matrix(path):
  np.savez(path, **{'counts/block_01': np.ones((2, 2))})


def not_finite(path):
  np.savez(path, **{'baselines/gzip': np.array(np.nan)})


@pytest.mark.parametrize(
  'damage', [no_zip, cut, folder, objects, matrix, not_finite]
)
def test_a_damaged_pass_is_left_out(damage, workdir, monkeypatch, capsys):
  drawn = []
  monkeypatch.setattr(
    run_pictures, '_draw', lambda arrays, *_: drawn.append(arrays) or []
  )
  run_pictures.save_pass(workdir, {'block_01': np.array([0, 3])}, {'xz': 2.0})
  assert exit_code(['report', str(workdir)]) == 0
  assert sorted(drawn.pop()) == ['baselines/xz', 'counts/block_01']
  assert capsys.readouterr().err == ''
  damage(workdir / run_pictures.VALIDATION_STATS)
  assert exit_code(['report', str(workdir)]) == 0
  assert drawn == [{}]
  err = capsys.readouterr().err
  assert err.count('\n') == 1
  assert 'validation_pass.npz' in err


def test_damaged_metrics_are_left_out(workdir, capsys):
  with (workdir / 'metrics.jsonl').open('ab') as file:
    file.write(b'7\n{"step": 9, "loss": "\xff"}\n{"loss": 1}\n')
  before = (workdir / 'metrics.jsonl').read_bytes()
  assert exit_code(['report', str(workdir)]) == 0
  assert (workdir / 'metrics.jsonl').read_bytes() == before
  (workdir / 'metrics.jsonl').unlink()
  (workdir / 'metrics.jsonl').mkdir()
  assert exit_code(['report', str(workdir)]) == 2
  assert "metrics.jsonl' can't be read" in capsys.readouterr().err


@pytest.mark.parametrize('is_link', [True, False])
def test_nothing_is_drawn_where_the_workdir_leads(is_link, workdir, capsys):
  """A workdir that only is read chooses no path that is written to."""
  victim = workdir / 'victim'
  victim.mkdir()
  plots = workdir / 'plots'
  if is_link:
    plots.symlink_to(victim)
  else:
    plots.touch()
  assert exit_code(['report', str(workdir)]) == 2
  (sentence,) = capsys.readouterr().err.splitlines()
  assert 'a file or a link' in sentence
  assert not list(victim.iterdir())

  plots.unlink()
  plots.mkdir()
  (victim / 'file').write_bytes(b'mine')
  (plots / 'training.png').symlink_to(victim / 'file')
  assert exit_code(['report', str(workdir)]) == 0
  assert (victim / 'file').read_bytes() == b'mine'
  assert (plots / 'training.png').read_bytes().startswith(b'\x89PNG')


def test_home(workdir, monkeypatch):
  monkeypatch.setenv('HOME', str(workdir.parent))
  monkeypatch.setattr(run_pictures, '_draw', lambda *_: [])
  assert exit_code(['report', f'~/{workdir.name}']) == 0
