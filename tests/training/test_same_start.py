# SPDX-License-Identifier: Apache-2.0
"""Processes that were started differently are told so."""

import json

import pytest

from jaxsparse.config import Config
from jaxsparse.config.errors import UserError
from jaxsparse.data.pieces import Corpus, Piece
from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.training import same_start


@pytest.fixture
def other(monkeypatch):
  """Lets a second process have what a function makes of this one's values."""

  def second(change):
    monkeypatch.setattr(same_start.jax, 'process_count', lambda: 2)
    monkeypatch.setattr(
      same_start.hosts, 'gather', lambda value: [value, change(value)]
    )

  return second


def changed(**replaced):
  """Changes facts and leaves a config alone, or the other way round."""

  def change(value):
    if isinstance(value, dict):
      return {k: replaced.get(k, v) for k, v in value.items()}
    config = json.loads(value)
    for path, new in replaced.items():
      section, _, name = path.partition('__')
      if section in config:
        config[section][name] = new
    return json.dumps(config)

  return change


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (dict(jaxsparse='b'), r'another jaxsparse \(\w+ -> b\)'),
    (dict(JAX='0.1'), r'another JAX \([\d.]+ -> 0\.1\)'),
    ({'--workdir': 'y'}, r'another --workdir \(x -> y\)'),
    (
      dict(model__num_layers=5, train__seed=2),
      r'config \(model.num_layers: \d+ -> 5; train.seed: 0 -> 2\)',
    ),
  ],
)
def test_another_program_is_named(other, change, message):
  other(changed(**change))
  with pytest.raises(UserError, match=rf'process 1 of 2 has .*{message} than'):
    same_start.require_same_program(Config(), 'x')


def test_a_host_may_have_a_cache_of_its_own(other):
  other(changed(data__cache_dir='~/elsewhere', data__prefetch=1))
  same_start.require_same_program(Config(), 'x')


def test_all_code_counts(tmp_path, monkeypatch):
  (tmp_path / 'nn').mkdir()
  (tmp_path / '__init__.py').write_text('')
  (tmp_path / 'nn' / 'layer.py').write_text('x = 1')
  here = tmp_path / 'training' / 'same_start.py'
  monkeypatch.setattr(same_start, '__file__', str(here))
  before = same_start._code()
  (tmp_path / 'nn' / 'layer.py').write_text('x = 2')
  assert same_start._code() != before


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('text', 'another text '),
    ('tokenizer', 'another tokenizer '),
    (
      'config.json in --workdir, which all must reach,',
      'another config.json in --workdir, which all must reach, ',
    ),
  ],
)
def test_other_data_are_named(other, tmp_path, name, message):
  pieces = [Piece(b'def x', True)]
  corpus = Corpus(
    key='k',
    directory=tmp_path,
    train=pieces,
    validation=pieces,
    test=None,
    validation_bytes=5,
  )
  (tmp_path / 'config.json').write_text('{}')
  other(changed())
  same_start.require_same_data(corpus, ByteTokenizer(), tmp_path)
  other(changed(**{name: 'b'}))
  with pytest.raises(UserError, match=f'process 1 of 2 has {message}'):
    same_start.require_same_data(corpus, ByteTokenizer(), tmp_path)
