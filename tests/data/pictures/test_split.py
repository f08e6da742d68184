# SPDX-License-Identifier: Apache-2.0
"""What is held out: a share at random, whole groups, never an equal pair."""

import pairs
import pytest

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data.corpus import build_corpus
from jaxsparse.data.pictures.pair import classes


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """40 pairs of 5 groups; 3 and 13 are equal pictures, 4 and 14 captions."""
  lines = pairs.records(40)
  lines[14]['captions'] = lines[4]['captions']
  path = pairs.write_folder(tmp_path_factory.mktemp('pairs'), lines)
  (path / 'images' / '013.png').write_bytes(pairs.png(3))
  return path


def _corpus(folder, tmp_path, said=None, **fields):
  config = DataConfig(
    pairs=str(folder),
    cache_dir=str(tmp_path),
    **dict(dict(validation_fraction=0.25), **fields),
  )
  return build_corpus(config, ([] if said is None else said).append)


def _names(part):
  return {pair.name for pair in part or ()}


def test_shares_are_drawn_by_names_alone(folder, tmp_path):
  said = []
  corpus = _corpus(folder, tmp_path, said, test_fraction=0.1)
  parts = [_names(x) for x in (corpus.train, corpus.validation, corpus.test)]
  assert len(set.union(*parts)) == sum(map(len, parts)) == 40
  assert 9 <= len(parts[1]) <= 12
  assert 3 <= len(parts[2]) <= 6
  assert said == [
    f'40 pairs: {len(parts[0])} to train, {len(parts[1])} to validate, '
    f'{len(parts[2])} to test; 2 share picture or meaning with another and '
    'count as right for it.'
  ]
  again = _corpus(folder, tmp_path, test_fraction=0.1)
  assert _names(again.validation) == parts[1]
  assert again.key == corpus.key


def test_more_pairs_move_few_others(tmp_path):
  """One that was learned must not become one that is held out."""
  held_out = []
  for number in (40, 44):
    folder = tmp_path / str(number)
    pairs.write_folder(folder, pairs.records(number))
    held_out.append(_names(_corpus(folder, tmp_path).validation))
  moved = held_out[0] ^ held_out[1]
  assert len({name for name in moved if name < '040'}) <= 3


@pytest.mark.parametrize('held_out', ['random', 'group'])
def test_equal_pairs_lie_in_one_split_with_one_number(
  folder, tmp_path, held_out
):
  for fraction in (0.1, 0.3, 0.5):
    corpus = _corpus(
      folder, tmp_path, held_out=held_out, validation_fraction=fraction
    )
    every = [*corpus.train, *corpus.validation]
    item = {pair.name: pair.item for pair in every}
    assert item['003.png'] == item['013.png']
    assert item['004.png'] == item['014.png']
    assert len(set(item.values())) == 38
    for a, b in (('003.png', '013.png'), ('004.png', '014.png')):
      assert (a in _names(corpus.train)) == (b in _names(corpus.train))


def test_whole_groups_are_held_out(folder, tmp_path):
  corpus = _corpus(folder, tmp_path, held_out='group', validation_fraction=0.4)
  groups = [
    {pair.group for pair in part} for part in (corpus.train, corpus.validation)
  ]
  assert groups[0] | groups[1] == {f'group {i}' for i in range(5)}
  assert not groups[0] & groups[1]
  assert len(groups[1]) == 2


def test_pairs_with_words_are_left_out(folder, tmp_path):
  """Of the first caption, as the second one holds colours."""
  corpus = _corpus(folder, tmp_path, without='picture 1')
  names = _names(corpus.train) | _names(corpus.validation)
  # 14 has the caption of 4.
  left_out = {'001.png', *(f'01{i}.png' for i in range(10) if i != 4)}
  assert names == {f'{i:03}.png' for i in range(40)} - left_out
  assert len(_corpus(folder, tmp_path, without='red').train) > 20


def test_the_key_is_of_the_content(folder, tmp_path):
  key = _corpus(folder, tmp_path).key
  assert _corpus(folder, tmp_path, validation_fraction=0.3).key != key
  moved = tmp_path / 'elsewhere'
  moved.mkdir()
  lines = (folder / 'captions.jsonl').read_text().splitlines()
  pairs.write_folder(moved, lines)
  (moved / 'images' / '013.png').write_bytes(pairs.png(3))
  assert _corpus(moved, tmp_path).key == key
  (moved / 'images' / '007.png').write_bytes(pairs.png(777))
  assert _corpus(moved, tmp_path).key != key


@pytest.mark.parametrize('field', ['distractors', 'meaning'])
def test_the_key_is_of_all_that_is_learned(tmp_path, field):
  """A run must not go on with others, nor end where there were none."""
  keys = []
  for number, value in enumerate(('', 'one', 'other')):
    lines = pairs.records(6)
    if value:
      lines[3][field] = value
    folder = pairs.write_folder(tmp_path / str(number), lines)
    keys.append(_corpus(folder, tmp_path).key)
  assert len(set(keys)) == 3
  # As it was when neither was part of it.
  assert keys[0] == '2b1e428da640f0fde77798dd'


def test_words_that_no_caption_has_are_said(folder, tmp_path):
  said = []
  _corpus(folder, tmp_path, said, without='pictures')
  assert said[0] == "data.without = 'pictures' is in no first caption."


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    (dict(pairs='file://a/b'), r"'file://a/b' cannot be reached \(no scheme f"),
    (dict(pairs='a.tar,file://b.tar'), r'data.pairs = .* cannot be reached \('),
    # Whose library is not installed for tests.
    (dict(pairs='s3://a/b'), r"data.pairs = 's3://a/b' cannot be reached \("),
    (dict(without='picture'), "data.without = 'picture' is in every first"),
    (dict(pairs='generated:shape'), 'did you mean shapes'),
    (dict(pairs='/no/such/place'), "'/no/such/place' names no pairs: give a"),
    (dict(pairs='/no/such/*.tar'), 'names no pairs: give a folder'),
    (dict(pairs='nowhere:shapes'), 'names no pairs: give a folder'),
  ],
)
def test_what_names_nothing_is_refused(folder, tmp_path, fields, words):
  fields = dict(dict(pairs=str(folder)), **fields)
  config = DataConfig(cache_dir=str(tmp_path), **fields)
  with pytest.raises(UserError, match=words) as error:
    build_corpus(config, print)
  assert '\n' not in str(error.value)


def test_an_empty_folder_is_refused(tmp_path):
  with pytest.raises(UserError, match=r'names no pairs: give a folder with'):
    _corpus(tmp_path, tmp_path)


def test_groups_that_are_missing_are_said(tmp_path):
  lines = pairs.records(4)
  del lines[2]['group']
  folder = pairs.write_folder(tmp_path, lines)
  with pytest.raises(UserError, match=r"'002.png' has none: give groups, or"):
    _corpus(folder, tmp_path, held_out='group')


def test_one_group_or_one_pair_is_too_few(tmp_path):
  lines = [dict(line, group='g') for line in pairs.records(4)]
  folder = pairs.write_folder(tmp_path / 'a', lines)
  with pytest.raises(UserError, match='has 1 groups, too few to train and to'):
    _corpus(folder, tmp_path, held_out='group')
  folder = pairs.write_folder(tmp_path / 'b', pairs.records(1))
  with pytest.raises(UserError, match='has 1 different pairs, too few'):
    _corpus(folder, tmp_path)


def test_classes_are_linked_through_others():
  keys = ['ab', 'c', 'bd', 'e', 'cf', 'de']
  assert classes(keys) == [0, 1, 0, 0, 1, 0]
  assert classes(['', '']) == [0, 1]
