# SPDX-License-Identifier: Apache-2.0
"""Tables in files beside tables in memory: the picture, and a whole run."""

import json
import pathlib

import pytest

from jaxsparse.experiments.bench import command, tables

ROOT = pathlib.Path(__file__).parents[3]


def test_the_picture_is_drawn_of_what_was_measured(tmp_path):
  found = json.loads((ROOT / 'results/tables_cpu.json').read_text())
  tables.draw(found['results'], str(tmp_path / 'a.png'))
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_a_whole_run(tmp_path, capsys):
  command.main(
    [
      'tables', '--num_keys=16', '--tokens=64', '--seq_len=32', '--reads=64',
      '--rounds=1', '--batches=1', f'--json={tmp_path / "a.json"}',
      f'--picture={tmp_path / "a.png"}',
    ]
  )  # fmt: skip
  records = json.loads((tmp_path / 'a.json').read_text())['results']
  assert [(r['task'], r['contender']) for r in records] == [
    ('convert', 'file'),
    ('open', 'file'),
    ('64 rows', 'device'),
    ('64 rows', 'small table'),
    ('64 rows', 'file'),
    ('64 rows, cold', 'device'),
    ('64 rows, cold', 'file'),
    ('decode, batch 1', 'device'),
    ('decode, batch 1', 'file'),
    ('decode, batch 1, cold', 'device'),
    ('decode, batch 1, cold', 'file'),
    ('train, 64 tokens', 'device'),
    ('train, 64 tokens', 'file'),
    ('train, 64 tokens, cold', 'device'),
    ('train, 64 tokens, cold', 'file'),
  ]
  assert (tmp_path / 'a.png').exists()
  assert 'train, 64 tokens: ' in capsys.readouterr().out
