import importlib.util
import json

import numpy as np
import pytest

from jaxsparse import bench
from jaxsparse.config import UltraMemConfig

TINY = [
  '--tokens=6', '--model_dim=8', '--num_keys=8', '--key_dim=4',
  '--num_selected=4', '--value_dim=6', '--rounds=1',
]  # fmt: skip


@pytest.fixture(scope='module')
def problem():
  config = UltraMemConfig(num_keys=8, key_dim=4, num_selected=4, value_dim=6)
  return bench.make_problem(config, 8, 6)


@pytest.mark.parametrize('name', ['naive jax, top_k', 'naive torch'])
def test_contenders_compute_the_same(problem, name):
  if name == 'naive torch' and not importlib.util.find_spec('torch'):
    pytest.skip('torch is not installed')
  ours = bench.contenders()['jaxsparse'](problem)['forward']()
  theirs = bench.contenders()[name](problem)['forward']()
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_command_prints_a_table_and_writes_json(capsys, tmp_path, monkeypatch):
  # One process per contender is for real runs; here its answer is made up.
  monkeypatch.setattr(bench, 'peak_bytes', lambda name, argv: 10**6)
  path = tmp_path / 'bench.json'
  bench.main(['memory_layer', *TINY, f'--json={path}'])
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(':')[0] for line in lines[:3]] == [
    'device', 'versions', 'copy bandwidth',
  ]  # fmt: skip
  results = json.loads(path.read_text())['results']
  assert set(results) == set(bench.contenders())
  for name, row in results.items():
    assert any(line.startswith(name) for line in lines)
    assert all(row[column] > 0 for column in bench.PASSES)


def test_peak_memory_of_one_contender(capsys):
  bench.main(['memory_layer', *TINY, '--peak_of', 'jaxsparse'])
  assert int(capsys.readouterr().out) > 10**7
