# SPDX-License-Identifier: Apache-2.0
"""A whole comparison: stopped, resumed, tabled and drawn."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
from small_suite import facts_suite

from jaxsparse.config.errors import UserError
from jaxsparse.data import facts
from jaxsparse.experiments.compare import command as entry
from jaxsparse.experiments.compare import runs
from jaxsparse.run import workdir_lock
from jaxsparse.run.progress import Reporter


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A comparison that a signal stopped in its second run, then ended."""
  folder = tmp_path_factory.mktemp('comparison')
  script = pathlib.Path(__file__).with_name('stopped_comparison.py')
  environment = os.environ | dict(
    JAX_PLATFORMS='cpu', PYTHONPATH=str(script.parents[3])
  )
  ended = subprocess.run(
    [sys.executable, str(script), str(folder)],
    env=environment,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 0, (ended.stdout, ended.stderr)
  starts = json.loads(ended.stdout.splitlines()[-1])
  return facts_suite(folder / 'cache'), folder / 'work', starts


@pytest.fixture(scope='module')
def planned(finished):
  """Its runs; their sizes take a while to find."""
  suite, work, _ = finished
  return runs.plan(suite, str(work))


def test_finished_runs_are_not_trained_again(finished):
  _, _, starts = finished
  # Two starts, the second stopped; one to go on; none when all is done.
  assert starts == [2, 3, 3]


def test_results_stand_alone(finished):
  _, work, _ = finished
  found = sorted(work.glob('runs/*/*/result.json'))
  assert [path.parent.name for path in found] == ['dense_0', 'ultramem_0']
  assert not list(work.glob('runs/*/*/checkpoints'))
  dense, sparse = (json.loads(path.read_text()) for path in found)
  assert dense['batches'] == sparse['batches']
  assert abs(sparse['flops_per_token'] / dense['flops_per_token'] - 1) < 0.01
  assert abs(sparse['parameters'] / 60_000 - 1) < 0.03
  assert sparse['config']['optimizer']['value_lr_multiplier'] == 3
  for result in (dense, sparse):
    assert result['num_facts'] == 72
    assert 0 <= result['recall'] <= 1
    assert 0 <= result['bits'] <= result['bits_of_all']
    assert [point[0] for point in result['curve']] == [1, 2, 3]
    assert result['tokens_per_second'] > 0
  assert list(sparse['usage_fraction']) == ['block_00']


def test_one_start_at_a_time(finished, planned, tmp_path):
  suite, work, _ = finished
  with (
    workdir_lock.held(work),
    pytest.raises(UserError, match='is in use by process'),
  ):
    entry.compare(suite, str(work))
  run = dataclasses.replace(planned[0], folder=tmp_path / 'run')
  with (
    workdir_lock.held(run.folder),
    pytest.raises(UserError, match='is in use by process'),
  ):
    runs.train(run, Reporter(is_silent=True))


@pytest.mark.parametrize('content', [b'', b'[]', b'{}', b'\xff'])
def test_a_damaged_result_is_named(content, planned, tmp_path):
  run = dataclasses.replace(planned[0], folder=tmp_path)
  (tmp_path / runs.RESULT).write_bytes(content)
  with pytest.raises(UserError, match='is damaged: remove it'):
    runs.finished(run)


def test_table_and_plots_are_written(finished):
  _, work, _ = finished
  table = (work / 'comparison.md').read_text()
  for part in ('| dense |', '| ultramem |', 'of 72 (', 'bits/parameter'):
    assert part in table
  record = json.loads((work / 'comparison.json').read_text())
  assert len(record['runs']) == 2
  for name in ('loss', 'seeds', 'recall'):
    image = (work / 'plots' / f'{name}.png').read_bytes()
    assert image.startswith(b'\x89PNG')


def test_another_config_is_refused_in_the_same_workdir(finished):
  suite, work, _ = finished
  changed = entry.suite_lib.restrict(suite, num_steps=4)
  with pytest.raises(UserError, match='the result of another config'):
    entry.compare(changed, str(work))


def test_a_result_from_before_a_field_existed_stands(planned, tmp_path):
  """Without it the model was what it is with its default, no other."""
  run = planned[1]
  result = json.loads((run.folder / runs.RESULT).read_text())
  run = dataclasses.replace(run, folder=tmp_path)
  del result['config']['model']['rope_fraction']
  # The default since, which is by file where files are many.
  result['config']['data']['split'] = 'file'
  del result['config']['data']['text_field']
  del result['config']['model']['memory']['gate']
  (tmp_path / runs.RESULT).write_text(json.dumps(result))
  assert runs.finished(run) == result
  del result['config']['model']['memory']['num_keys']
  (tmp_path / runs.RESULT).write_text(json.dumps(result))
  with pytest.raises(UserError, match='the result of another config'):
    runs.finished(run)


def test_other_batches_are_refused(finished, planned, tmp_path):
  _, work, _ = finished
  results = json.loads((work / 'comparison.json').read_text())['runs']
  other = dict(results[0], batches='those of another text')
  run = dataclasses.replace(planned[0], folder=tmp_path / 'run')
  with pytest.raises(UserError, match='would train on other batches'):
    runs.train(run, Reporter(is_silent=True), [other])


def test_seeds_are_complete_one_after_another(tmp_path):
  suite = facts_suite(tmp_path, seeds=(0, 1), people=(12, 24))
  found = runs.plan(suite, 'work')
  assert [(run.seed, run.people, run.architecture) for run in found] == [
    (seed, people, name)
    for seed in (0, 1)
    for people in (12, 24)
    for name in ('dense', 'ultramem')
  ]
  assert len({run.folder for run in found}) == 8


def test_steps_are_such_that_facts_are_seen_equally_often(tmp_path):
  suite = facts_suite(tmp_path, people=(12, 24), exposures=10)
  for run in runs.plan(suite, 'work'):
    data = run.config.data
    tokens = run.config.train.num_steps * data.batch_size * data.seq_len
    seen = facts.exposures(tokens, run.people)
    one_step = facts.exposures(data.batch_size * data.seq_len, run.people)
    assert 10 <= seen < 10 + one_step


def test_a_learning_rate_may_fall_with_the_number_of_people(tmp_path):
  suite = facts_suite(tmp_path, people=(12, 24))
  slower = dataclasses.replace(
    suite.architectures['ultramem'], lr_per_person=0.06
  )
  suite = dataclasses.replace(
    suite, architectures=dict(suite.architectures, ultramem=slower)
  )
  assert [
    run.config.optimizer.learning_rate for run in runs.plan(suite, 'work')
  ] == [3e-3, 3e-3, 3e-3, 2.5e-3]


def test_steps_that_are_asked_for_override_exposures(tmp_path):
  suite = facts_suite(tmp_path, exposures=10)
  suite = entry.suite_lib.restrict(suite, num_steps=4)
  assert {run.config.train.num_steps for run in runs.plan(suite, 'w')} == {4}
