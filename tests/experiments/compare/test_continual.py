# SPDX-License-Identifier: Apache-2.0
"""New facts beside old ones: planned, learned from a base, tabled, drawn."""

import dataclasses
import json
import pathlib

import pytest
from small_suite import facts_suite

from jaxsparse.config import AdapterConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import facts
from jaxsparse.experiments.compare import command as entry
from jaxsparse.experiments.compare import continual_report, report, runs
from jaxsparse.experiments.compare import suite as suite_lib
from jaxsparse.experiments.compare.continual import Continual, Method
from jaxsparse.run import adapter_files

ROWS = AdapterConfig(kind='rows', num_rows=8, ranking='kl')
METHODS = dict(
  full=Method(rates=(1e-3, 2e-3)),
  rows=Method(rates=(0.1,), adapter=ROWS, replay_share=0.5),
)


def small_suite(cache_dir, **fields):
  suite = facts_suite(cache_dir)
  continual = Continual(
    people=4, exposures=1, methods=METHODS, optimizer=dict(clip_norm=0.5)
  )
  return dataclasses.replace(
    suite,
    architectures=dict(ultramem=suite.architectures['ultramem']),
    continual=dataclasses.replace(continual, **fields),
  )


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A base and a method, each trained for a few steps."""
  folder = tmp_path_factory.mktemp('continual')
  suite = suite_lib.restrict(small_suite(folder / 'cache'), only=('rows',))
  entry.compare(suite, str(folder / 'work'))
  return suite, folder / 'work'


def result_of(folder: pathlib.Path) -> dict:
  return json.loads((folder / runs.RESULT).read_text())


def test_a_seed_has_its_base_and_then_each_method_at_each_rate(tmp_path):
  suite = small_suite(tmp_path)
  planned = runs.plan(suite, 'work')
  assert [(r.architecture, r.config.optimizer.learning_rate) for r in planned][
    1:
  ] == [('full', 1e-3), ('full', 2e-3), ('rows', 0.1)]
  base, full, _, rows = planned
  assert base.keeps_checkpoints
  assert base.known is None
  assert full.config.train.start_from == str(base.folder)
  assert full.config.optimizer.clip_norm == 0.5
  assert full.config.adapter.kind == ''
  assert rows.config.adapter == ROWS
  assert len({run.folder for run in planned}) == 4


def test_a_share_of_old_text_makes_a_run_as_much_longer(tmp_path):
  suite = small_suite(tmp_path, people=40, exposures=30)
  _, full, _, rows = runs.plan(suite, 'work')
  steps = [run.config.train.num_steps for run in (full, rows)]
  per_step = 8 * 16
  assert steps[0] == -(-facts.num_tokens(30, 40) // per_step)
  assert abs(steps[1] - 2 * steps[0]) <= 1


@pytest.mark.slow
def test_a_method_learns_from_the_base_and_is_asked_for_both(finished):
  suite, work = finished
  base, rows = runs.plan(suite, str(work))
  result = result_of(rows.folder)
  assert result['num_facts'] == 4 * 6
  assert result['old_people'] == 12
  assert result['rate'] == 0.1
  assert result['num_trained'] == 8 * 16
  before = result_of(base.folder)['recall']
  assert result['old_recall_before'] == pytest.approx(before)
  for name in ('recall', 'recall_before', 'old_recall'):
    assert 0 <= result[name] <= 1
  _, meta = adapter_files.read(rows.folder / 'adapters' / 'adapter')
  assert meta['steps'] == result['num_steps'] == 3
  assert (base.folder / 'checkpoints').is_dir()
  assert not (rows.folder / 'checkpoints').exists()


@pytest.mark.slow
def test_new_people_are_none_of_the_old(finished):
  suite, work = finished
  base, rows = runs.plan(suite, str(work))
  old, new = (
    {
      ' '.join(line.split()[:2])
      for line in (run.data_folder / 'biographies_000.txt').open()
      if not line.startswith('The ')
    }
    for run in (base, rows)
  )
  assert len(old) == 12
  assert len(new) == 4
  assert old.isdisjoint(new)


@pytest.mark.slow
def test_finished_runs_are_not_trained_again(finished, monkeypatch):
  suite, work = finished
  monkeypatch.setattr(runs.loop, 'fit', None)
  entry.compare(suite, str(work))
  table = (work / 'comparison.md').read_text()
  assert '| rows | 128 | 0.1 |' in table
  assert (work / 'plots' / 'continual.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_another_share_of_old_text_is_another_run(finished):
  suite, work = finished
  methods = dict(rows=dataclasses.replace(METHODS['rows'], replay_share=0.25))
  continual = dataclasses.replace(suite.continual, methods=methods)
  changed = dataclasses.replace(suite, continual=continual)
  with pytest.raises(UserError, match='the result of another config'):
    entry.compare(changed, str(work))


def made(method, rate, seed, new, old):
  return dict(
    architecture=method, rate=rate, seed=seed, recall=new, old_recall=old,
    recall_before=0.05, old_recall_before=0.8, num_trained=1000, people=4,
    old_people=12,
  )  # fmt: skip


def test_methods_are_compared_at_their_best_rate_and_at_levels(tmp_path):
  results = [
    dict(architecture='ultramem', seed=0, people=12, recall=0.8),
    *(made('full', 1e-3, seed, 0.6, 0.6) for seed in (0, 1)),
    made('full', 2e-3, 0, 0.9, 0.4),
    made('full', 2e-3, 1, 1.0, 0.0),
    made('rows', 0.1, 0, 0.7, 0.72),
  ]
  full = continual_report.points(results, 'full')
  assert [point.rate for point in full] == [1e-3, 2e-3]
  assert full[1].new.values == (0.9, 1.0)
  assert full[1].forgotten.values == pytest.approx((0.5, 1.0))
  assert continual_report.best(full) == full[1]
  assert continual_report.least_forgotten(full, 0.5) == full[0]
  assert continual_report.least_forgotten(full, 0.96) is None
  assert (
    continual_report.forgotten(dict(old_recall=0, old_recall_before=0)) == 0
  )
  table = report.tables(small_suite(tmp_path), results)
  assert '| full | 1,000 | 0.002 | 95.0% (90.0% to 100.0%; ± 7.1%)' in table
  assert '| rows | 10.0% at 0.1 | - | - |' in table
  assert 'The base has 80.0% (80.0% to 80.0%; ± 0.0%) of the facts' in table


REFUSED = [
  (lambda: Method(rates=()), 'rates must be positive'),
  (lambda: Method(rates=(1.0, 1.0)), 'rates must be positive'),
  (
    lambda: Method(rates=(1.0,), replay_share=1.0),
    'replay_share must be at least 0 and below 1, got 1.0',
  ),
  (lambda: small_suite('', people=0), 'people must be positive, got 0'),
  (lambda: small_suite('', methods={}), 'continual needs a method'),
  (
    lambda: small_suite('', methods={'a/b': METHODS['full']}),
    "named by letters, digits and _; got 'a/b'",
  ),
  (
    lambda: dataclasses.replace(small_suite(''), people=(1, 2)),
    'one architecture and one number of people, got 1 and 2',
  ),
  (
    lambda: suite_lib.restrict(small_suite(''), only=('lora',)),
    '--only names lora, but the suite has full, rows',
  ),
]


@pytest.mark.parametrize(('make', 'message'), REFUSED)
def test_what_makes_no_sense_is_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()
