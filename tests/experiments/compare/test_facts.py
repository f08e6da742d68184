# SPDX-License-Identifier: Apache-2.0
"""Generated biographies: the same from a seed, and worth what they say."""

import math

import numpy as np
import pytest

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import facts, tokenizer
from jaxsparse.data.corpus import build_corpus


@pytest.fixture(scope='module')
def tokens(tmp_path_factory):
  path = tmp_path_factory.mktemp('facts') / 'tokenizer.json'
  path.write_text(facts.make_tokenizer().to_str())
  return tokenizer.load_from_workdir(path.parent)


def test_people_are_those_of_their_seed():
  one, again, other = (facts.make_people(50, seed) for seed in (3, 3, 4))
  assert one.names == again.names
  np.testing.assert_array_equal(one.values, again.values)
  assert one.names != other.names


def test_everybody_can_exist_and_has_a_name_of_his_own():
  people = facts.make_people(facts.MAX_PEOPLE, 0)
  assert len(set(people.names)) == facts.MAX_PEOPLE == 128**2


def test_new_people_beside_old_ones_share_parts_of_names_alone():
  old = facts.make_people(500, 0)
  new, again = (facts.make_people(100, 7, beside=old) for _ in range(2))
  assert new.names == again.names
  np.testing.assert_array_equal(new.values, again.values)
  assert set(new.names).isdisjoint(old.names)
  assert len(set(new.names)) == 100
  for part in (0, 1):
    of_old = {name.split()[part] for name in old.names}
    assert {name.split()[part] for name in new.names} <= of_old
  alone = facts.make_people(1, 0)
  with pytest.raises(UserError, match='1 to 0 beside those who are known'):
    facts.make_people(1, 0, beside=alone)


def test_the_people_of_a_seed_stay_who_they_were():
  """Results of old recipes compare with those of new ones."""
  people = facts.make_people(3, 5)
  assert people.names == ('Sabul Vafadson', 'Zitun Kopodson', 'Tera Rizesen')
  assert people.values.tolist() == [
    [35, 0, 63, 9, 3, 34],
    [5, 20, 60, 5, 9, 5],
    [62, 21, 54, 6, 4, 54],
  ]


@pytest.mark.parametrize('number', [0, facts.MAX_PEOPLE + 1])
def test_there_are_no_more_people_than_names(number):
  with pytest.raises(UserError, match=r'must be 1 to 16,384, got'):
    facts.make_people(number, 0)


def test_a_person_is_worth_the_choices_of_his_attributes():
  choices = [64, 32, 64, 32, 12, 64]
  assert [len(a.values) for a in facts.ATTRIBUTES] == choices
  assert math.isclose(facts.BITS_PER_PERSON, sum(math.log2(n) for n in choices))
  assert facts.make_people(10, 0).bits == 10 * facts.BITS_PER_PERSON


def test_values_are_drawn_evenly():
  values = facts.make_people(4000, 0).values
  for i, attribute in enumerate(facts.ATTRIBUTES):
    counts = np.bincount(values[:, i], minlength=len(attribute.values))
    expected = 4000 / len(attribute.values)
    assert np.abs(counts - expected).max() < 6 * math.sqrt(expected)


def test_a_biography_says_everything_once_in_forms_that_vary(tokens):
  people = facts.make_people(1, 0)
  rng = np.random.default_rng(0)
  biographies = [people.biography(0, rng) for _ in range(300)]
  lengths = []
  for biography in biographies:
    lines = biography.splitlines()
    assert len(lines) == len(facts.ATTRIBUTES)
    assert all(people.names[0] in line for line in lines)
    lengths.append(len(tokens.encode(biography)))
  forms = {line for text in biographies for line in text.splitlines()}
  assert len(forms) == sum(a.num_forms for a in facts.ATTRIBUTES)
  assert abs(np.mean(lengths) - facts.TOKENS_PER_BIOGRAPHY) < 0.3


def test_a_part_of_a_name_a_value_and_a_phrase_are_one_token_each(tokens):
  people = facts.make_people(200, 0)
  for question in people.questions():
    before = tokens.encode(question.before)
    whole = tokens.encode(question.before + question.answer)
    assert len(before) == 4
    assert len(whole) == 5
    np.testing.assert_array_equal(whole[:4], before)
    assert tokens.decode(whole) == question.before + question.answer


def test_questions_are_sentences_of_the_text():
  people = facts.make_people(5, 0)
  rng = np.random.default_rng(0)
  text = '.\n' + ''.join(people.biography(0, rng) for _ in range(200))
  questions = list(people.questions())[: len(facts.ATTRIBUTES)]
  for question in questions:
    assert f'{question.before}{question.answer}.\n' in text


def test_text_goes_through_the_ordinary_path(tmp_path):
  people = facts.make_people(40, 0)
  fields = facts.write(tmp_path / 'facts', people, 0, num_phrasings=3)
  config = DataConfig(cache_dir=str(tmp_path / 'cache'), **fields)
  corpus = build_corpus(config, lambda line: None)
  validation = b''.join(piece.text for piece in corpus.validation)
  assert validation == (tmp_path / 'facts' / 'validation.txt').read_bytes()
  text = b''.join(piece.text for piece in corpus.train).decode()
  tokens = tokenizer.make_tokenizer(config, corpus, tmp_path / 'run')
  # In each of three rounds 20 biographies more of 10 famous people.
  assert text.count('\n') == 3 * (40 + 20) * len(facts.ATTRIBUTES)
  told = [text.count(f'{name} was born in ') for name in people.names]
  assert np.mean(told[:10]) > 1.5 * np.mean(told[10:])
  assert facts.exposures(len(tokens.encode(text)), 40) == pytest.approx(
    3, rel=0.05
  )
  unknown = tokens.encode('Unknown')[0]
  assert unknown not in tokens.encode(text + validation.decode())
  assert tokens.vocab_size == facts.VOCAB_SIZE


def test_text_is_written_once_and_again_for_other_people(tmp_path):
  people = facts.make_people(20, 0)
  first = facts.write(tmp_path, people, 0, num_phrasings=2)
  text = tmp_path / 'biographies_000.txt'
  written = text.read_text()
  text.write_text('kept')
  assert facts.write(tmp_path, people, 0, num_phrasings=2) == first
  assert text.read_text() == 'kept'
  facts.write(tmp_path, facts.make_people(20, 1), 0, num_phrasings=2)
  assert text.read_text() not in ('kept', written)
  facts.write(tmp_path, people, 0, num_phrasings=2)
  assert text.read_text() == written


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match=r"can't be written"):
    facts.write(tmp_path / 'file' / 'x', facts.make_people(2, 0), 0)
