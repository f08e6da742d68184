"""Pictures from what a run leaves, and `python -m jaxsparse.report`."""

import json

import numpy as np
import pytest
from pictures import figures, texts

from jaxsparse import report, saved_config
from jaxsparse.analysis import run_pictures
from jaxsparse.config import Config, MemoryConfig, ModelConfig


@pytest.fixture
def workdir(tmp_path):
  (tmp_path / 'config.json').write_text(saved_config.to_json(Config()))
  rows = [
    {
      'step': step,
      'loss': 3 - step / 10,
      'block_00/moe/load_max': 1.5,
      'block_00/moe/unevenness': 0.1,
      'block_01/memory/slots_used': 0.5,
      'block_01/memory/unevenness': 1.0,
      'block_02/attention/kept_share': 0.3,
      'block_02/attention/router_entropy': 2.0,
    }
    for step in range(1, 5)
  ]
  lines = ''.join(json.dumps(row) + '\n' for row in rows)
  (tmp_path / 'metrics.jsonl').write_text(lines)
  return tmp_path


def test_report_draws_what_there_is(workdir, capsys):
  assert report.main([str(workdir)]) == 0
  counts = {
    'block_00 experts': np.array([5, 1, 0, 2]),
    'block_01': np.array([0, 3, 1, 0, 9]),
  }
  run_pictures.save_pass(workdir, counts, {'gzip': 2.6})
  assert report.main([str(workdir)]) == 0
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
  assert report.main([str(workdir)]) == 0
  said = '\n'.join(text for figure in written for text in texts(figure))
  assert 'memory of block 1, added after block 3: 50.0% used' in said
  assert 'memory of block 2: 100.0% used' in said


def test_a_workdir_for_reading_only(workdir, tmp_path_factory, capsys):
  """Pictures go where they are told to, and nothing into the workdir."""
  (workdir / 'plots').write_text('no folder, as nobody may make one')
  before = sorted(workdir.rglob('*'))
  assert report.main([str(workdir)]) == 1
  said = capsys.readouterr()
  assert said.out == ''
  assert said.err.count('\n') == 1
  assert 'plots' in said.err
  assert '--output=FOLDER' in said.err
  output = tmp_path_factory.mktemp('out') / 'of' / 'run'
  assert report.main([str(workdir), f'--output={output}']) == 0
  names = capsys.readouterr().out.split()
  assert f'{output}/training.png' in names
  assert sorted(map(str, output.iterdir())) == sorted(names)
  assert sorted(workdir.rglob('*')) == before


def test_without_a_run_it_is_one_sentence(tmp_path, capsys):
  assert report.main([str(tmp_path)]) == 1
  (tmp_path / 'config.json').write_text(saved_config.to_json(Config()))
  assert report.main([str(tmp_path)]) == 1
  lines = capsys.readouterr().err.strip().splitlines()
  assert 'holds no config.json' in lines[0]
  assert 'holds no metrics yet' in lines[1]
