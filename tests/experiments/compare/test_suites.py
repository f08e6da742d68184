# SPDX-License-Identifier: Apache-2.0
"""Suite files, the command line, and what they refuse."""

import pathlib
import sys

import pytest
from lanes import few
from small_suite import facts_suite

from jaxsparse.analysis import cost
from jaxsparse.config import MemoryConfig, MoEConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data.needles import Needles
from jaxsparse.experiments.compare import command as entry
from jaxsparse.experiments.compare import runs
from jaxsparse.experiments.compare import suite as suite_lib
from jaxsparse.experiments.compare.suite import Architecture

SUITES = sorted(
  (pathlib.Path(__file__).parents[3] / 'configs' / 'compare').glob('*.py')
)


def test_all_suites_are_here():
  names = [path.stem for path in SUITES]
  assert names == [
    'attention',
    'continual',
    'cpu',
    'cpu_ablation',
    'facts',
    'facts_24000',
    'h100',
    'needles',
    'sparse_attention',
  ]


# Others have the same sizes and more of them.
LARGE = ('cpu', 'cpu_ablation', 'facts_24000', 'h100')


@pytest.mark.parametrize(
  'path',
  few([path for path in SUITES if path.stem not in LARGE], SUITES),
  ids=lambda path: path.stem,
)
def test_suite_derives_its_sizes(path, tmp_path):
  suite = suite_lib.load(str(path))
  planned = runs.plan(suite, str(tmp_path))
  assert f'--suite=configs/compare/{path.name}' in path.read_text()
  length = suite.base.data.seq_len
  budget = cost.forward_flops(suite.base.model, length)
  for run in planned:
    if run.known:
      continue
    model = run.config.model
    fields = suite.architectures[run.architecture].model
    if 'mlp_dim' in fields:
      assert model.mlp_dim == fields['mlp_dim']
      continue
    assert abs(cost.forward_flops(model, length) / budget - 1) <= 0.01
    if model.memory or model.moe:
      total = cost.count_parameters(model).published
      assert abs(total / suite.total_parameters - 1) <= 0.03


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(seeds=()), 'a suite needs a seed'),
    (dict(seeds=(1, 1)), 'seeds must differ'),
    (dict(exposures=-1), 'exposures must be at least 0, got -1'),
    (dict(people=(), exposures=1), 'exposures are those of facts'),
    (dict(architectures={}), 'a suite needs an architecture'),
    (dict(needles=Needles()), 'people and needles exclude each other'),
    (
      dict(needles=Needles(), people=()),
      'base.data.seq_len is 16, but documents have 128 tokens',
    ),
    (dict(architectures={'a/b': Architecture()}), 'is named by letters'),
    (
      dict(
        architectures={
          'both': Architecture(memory=MemoryConfig(), moe=MoEConfig())
        }
      ),
      'both memory and moe',
    ),
    (
      dict(architectures={'slow': Architecture(lr_per_person=-1.0)}),
      "lr_per_person of 'slow' must be positive",
    ),
    (
      dict(people=(), architectures={'slow': Architecture(lr_per_person=1.0)}),
      'in a suite with people, or 0; got 1.0',
    ),
  ],
)
def test_suite_refuses(fields, message, tmp_path):
  with pytest.raises(UserError, match=message):
    facts_suite(tmp_path, **fields)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(only=('peer',)), '--only names peer, but the suite has dense'),
    (dict(text='*.txt'), '--text needs a suite of language'),
    (dict(num_steps=-1), 'num_steps must be positive'),
  ],
)
def test_narrowing_refuses(fields, message, tmp_path):
  with pytest.raises(UserError, match=message):
    suite_lib.restrict(facts_suite(tmp_path), **fields)


def test_people_need_a_suite_of_facts(tmp_path):
  suite = facts_suite(tmp_path, people=())
  with pytest.raises(UserError, match='--people needs a suite of generated'):
    suite_lib.restrict(suite, people=(5,))


def test_narrowing_keeps_the_order_of_the_suite(tmp_path):
  suite = suite_lib.restrict(
    facts_suite(tmp_path), only=('ultramem', 'dense'), seeds=(7,), people=(9,)
  )
  assert list(suite.architectures) == ['dense', 'ultramem']
  assert (suite.seeds, suite.people) == ((7,), (9,))


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (
      'def get_suite():\n  return 3',
      'must return a jaxsparse.experiments.compare.suite',
    ),
    ('x = 1', 'could not be read'),
    ('1/0', 'ZeroDivisionError'),
  ],
)
def test_file_that_is_no_suite_is_named(content, message, tmp_path):
  path = tmp_path / 'suite.py'
  path.write_text(content)
  with pytest.raises(UserError, match=message):
    suite_lib.load(str(path))


def test_missing_file_is_named():
  with pytest.raises(UserError, match='is no file'):
    suite_lib.load('nowhere.py')


@pytest.mark.parametrize('flag', ['--seeds', '--people'])
def test_numbers_are_whole(flag):
  arguments = ['--suite=x', '--workdir=y', f'{flag}=1,two']
  with pytest.raises(UserError, match=f'{flag} must be whole numbers|no file'):
    entry.main(arguments)


def test_help_tells_the_options(capsys, monkeypatch):
  monkeypatch.setattr(sys, 'argv', ['compare', '--help'])
  with pytest.raises(SystemExit) as ended:
    entry.main(['--help'])
  assert ended.value.code == 0
  out = capsys.readouterr().out
  for option in ('--suite', '--workdir', '--only', '--seeds', '--text'):
    assert option in out
