# SPDX-License-Identifier: Apache-2.0
"""Batches of pairs: typed, deterministic, resumable, the same for processes."""

import itertools
import json

import numpy as np
import pairs
import pytest

from jaxsparse.config import AugmentConfig, DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import pipeline
from jaxsparse.data.corpus import build_corpus
from jaxsparse.data.pictures import batches, stored
from jaxsparse.data.pictures.pair import Pair
from jaxsparse.data.pieces import Corpus
from jaxsparse.data.tokenizer import ByteTokenizer, make_tokenizer

S, T = 8, 24
TOKENIZER = ByteTokenizer()
AUGMENT = AugmentConfig(shift=0.2, noise=0.05)


def _config(folder, **fields):
  return DataConfig(
    pairs=str(folder),
    cache_dir=str(folder / 'cache'),
    **dict(
      dict(
        seq_len=T,
        batch_size=8,
        num_lanes=4,
        prefetch=2,
        validation_fraction=0.35,
        augment=AUGMENT,
      ),
      **fields,
    ),
  )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('pairs')
  return pairs.write_folder(path, pairs.records(31))


@pytest.fixture(scope='module')
def corpus(folder):
  return build_corpus(_config(folder), lambda _: None)


@pytest.fixture(scope='module')
def read(corpus):
  return stored.reader(corpus, S)


def _train(folder, corpus, read, seed=0, process=(0, 1), **fields):
  return batches.train_iterator(
    _config(folder, **fields), corpus, TOKENIZER, seed, read, *process
  )


def _take(iterator, number):
  return list(itertools.islice(iterator, number))


def _assert_equal(a, b):
  assert len(a) == len(b) > 0
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def test_batches_are_whole_and_typed(folder, corpus, read):
  batch = next(_train(folder, corpus, read))
  assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == dict(
    images=((8, S, S, 3), 'float32'),
    tokens=((8, T), 'int32'),
    targets=((8, T), 'int32'),
    positions=((8, T), 'int32'),
    segment_ids=((8, T), 'int32'),
    loss_weight=((8, T), 'float32'),
    item=((8,), 'int32'),
  )
  assert -1 <= batch['images'].min() < batch['images'].max() <= 1


def _text(batch, row):
  length = batch['segment_ids'][row].sum()
  return TOKENIZER.decode(batch['tokens'][row][1:length])


def test_a_row_is_one_caption_of_its_pair(folder, corpus, read):
  """Both captions are drawn in some epoch."""
  captions = {pair.item: pair.captions for pair in corpus.train}
  seen = set()
  for batch in _take(_train(folder, corpus, read), 12):
    for row, item in enumerate(batch['item'].tolist()):
      text = _text(batch, row)
      assert text in captions[item]
      seen.add(captions[item].index(text))
      length = len(text) + 1
      assert batch['tokens'][row][0] == TOKENIZER.begin_id
      np.testing.assert_array_equal(
        batch['targets'][row][: length - 1], batch['tokens'][row][1:length]
      )
      assert batch['targets'][row][length - 1] == TOKENIZER.boundary_id
      for name in ('segment_ids', 'loss_weight'):
        assert (batch[name][row] == (np.arange(T) < length)).all()
      assert batch['positions'][row][length - 1] == length - 1
  assert seen == {0, 1}


def test_an_epoch_has_every_pair_once(folder, corpus, read):
  number = len(corpus.train)
  stream = [
    item
    for batch in _take(_train(folder, corpus, read, num_lanes=1), 9)
    for item in batch['item'].tolist()
  ]
  epochs = [stream[i * number : (i + 1) * number] for i in range(3)]
  for epoch in epochs:
    assert sorted(epoch) == sorted(pair.item for pair in corpus.train)
  assert epochs[0] != epochs[1] != epochs[2]


def test_pictures_change_from_epoch_to_epoch_alone(folder, corpus, read):
  """By seed, pair and epoch: lanes and processes have no part in it."""
  found = []
  number = 2 * len(corpus.train) // 8
  for lanes in (1, 4):
    seen = {}
    for batch in _take(_train(folder, corpus, read, num_lanes=lanes), number):
      for item, picture in zip(batch['item'], batch['images'], strict=True):
        seen.setdefault(int(item), set()).add(picture.tobytes())
    # Two epochs of each.
    assert sum(map(len, seen.values())) == 8 * number
    assert {len(pictures) for pictures in seen.values()} == {2}
    found.append(seen)
  assert found[0] == found[1]
  other = next(_train(folder, corpus, read, seed=1))
  assert (
    other['item'].tolist()
    != next(_train(folder, corpus, read))['item'].tolist()
  )


@pytest.mark.parametrize('count', [2, 4])
def test_processes_see_the_same_global_stream(folder, corpus, read, count):
  whole = _take(_train(folder, corpus, read), 8)
  parts = [
    _take(_train(folder, corpus, read, process=(p, count)), 8)
    for p in range(count)
  ]
  together = [
    {name: np.concatenate([x[name] for x in rows]) for name in rows[0]}
    for rows in zip(*parts, strict=True)
  ]
  _assert_equal(whole, together)


def test_a_saved_state_goes_on_bit_for_bit(folder, corpus, read):
  """Through JSON, with another number of processes and another prefetch."""
  whole = _take(_train(folder, corpus, read), 14)
  parts = [_train(folder, corpus, read, process=(p, 2)) for p in range(2)]
  for part in parts:
    _take(part, 5)
  state = pipeline.merge_states([part.get_state() for part in parts])
  resumed = _train(folder, corpus, read, prefetch=0)
  resumed.set_state(json.loads(json.dumps(state)))
  _assert_equal(whole[5:], _take(resumed, 9))


def test_a_state_of_other_pairs_or_another_seed_is_refused(
  folder, corpus, read
):
  state = _train(folder, corpus, read).get_state()
  with pytest.raises(UserError, match='the saved data state has seed = 0'):
    _train(folder, corpus, read, seed=1).set_state(state)
  with pytest.raises(UserError, match='the saved data state has corpus'):
    _train(folder, corpus, read).set_state(dict(state, corpus='another'))


@pytest.mark.parametrize('count', [1, 2])
def test_validation_is_one_pass_in_order_unchanged(folder, corpus, read, count):
  config = _config(folder)
  parts = [
    list(
      batches.validation_batches(
        config, corpus.validation, TOKENIZER, read, p, count
      )
    )
    for p in range(count)
  ]
  rows = [
    {name: np.concatenate([x[name] for x in some]) for name in some[0]}
    for some in zip(*parts, strict=True)
  ]
  whole = {name: np.concatenate([x[name] for x in rows]) for name in rows[0]}
  number = len(corpus.validation)
  assert len(whole['item']) % 8 == 0 != number % 8
  assert whole['item'][:number].tolist() == [
    pair.item for pair in corpus.validation
  ]
  assert (whole['item'][number:] == batches.PADDING).all()
  for name, x in whole.items():
    if name != 'item':
      assert not x[number:].any()
  for row, pair in enumerate(corpus.validation):
    assert _text(whole, row) == pair.captions[0]
    np.testing.assert_allclose(
      whole['images'][row], read(pair.number) / 127.5 - 1, atol=1e-6
    )


def test_prompts_are_read_and_not_learned(folder):
  config = _config(folder)
  row = batches.text_row(config, TOKENIZER, 'red', 'why? ')
  assert TOKENIZER.decode(row['tokens'][1:9]) == 'why? red'
  learned = row['targets'][row['loss_weight'] > 0]
  assert learned.tolist() == [*b'red', TOKENIZER.boundary_id]


def test_candidates_are_the_caption_and_its_distractors(folder, read):
  fields = dict(prompt='it is ', captions=('red', 'rosy'))
  some = [
    Pair(name='a', number=0, distractors=('blue', 'green'), **fields),
    Pair(name='b', number=1, **fields),
    Pair(name='c', number=2, distractors=('grey',), item=7, **fields),
  ]
  args = _config(folder), some, TOKENIZER, read
  (candidates,) = batches.candidate_batches(*args)
  said = [[_text(batch, row) for row in range(2)] for batch in candidates]
  assert said[:2] == [['it is red', 'it is red'], ['it is blue', 'it is grey']]
  # Of which the second pair has no more.
  assert said[2][0] == 'it is green'
  assert candidates[2]['item'][1] == batches.PADDING
  assert candidates[1]['item'][1] == 7
  for batch in candidates[1:]:
    same = np.array_equal(batch['images'][0], candidates[0]['images'][0])
    assert same


def test_a_distractor_is_drawn_for_each_pair_that_has_some(folder, read):
  some = [
    Pair(name='a', number=0, captions=('red',), distractors=('blue', 'grey')),
    Pair(name='b', number=1, captions=('pink',)),
  ]
  corpus = Corpus(
    key='', directory=folder, train=some, validation=some, test=None,
    validation_bytes=0,
  )  # fmt: skip
  config = dict(distractors=True, batch_size=2, num_lanes=2)
  seen = set()
  for batch in _take(_train(folder, corpus, read, **config), 9):
    rows = batch['tokens'][:, 1].tolist()
    first, second = (rows.index(ord(letter)) for letter in 'rp')
    wrong = {name: batch[f'wrong_{name}'] for name in ('tokens', 'segment_ids')}
    seen.add(_text(wrong, first))
    assert not any(x[second].any() for x in wrong.values())
  assert seen == {'blue', 'grey'}


def test_some_words_are_read_as_unknown_ones(folder, corpus, read, tmp_path):
  fields = dict(tokenizer='words', augment=AugmentConfig(unknown=0.4))
  tokens = make_tokenizer(_config(folder, **fields), corpus, tmp_path)
  (unknown,) = tokens.encode('unheard')
  shares = []
  for batch in _take(
    batches.train_iterator(_config(folder, **fields), corpus, tokens, 0, read),
    12,
  ):
    said = batch['segment_ids'].astype(bool)
    said[:, 0] = False
    shares.append((batch['tokens'][said] == unknown).mean())
  assert 0.3 < np.mean(shares) < 0.5
  assert unknown not in tokens.encode(corpus.train[0].captions[0])


def test_long_captions_are_cut_and_counted(folder, corpus):
  row = batches.text_row(_config(folder), TOKENIZER, 'x' * 99)
  assert (row['loss_weight'] == 1).all()
  assert row['tokens'].shape == row['targets'].shape == (T,)
  said = []
  batches.tell_of_long_captions(
    _config(folder, seq_len=10), corpus, TOKENIZER, said.append
  )
  captions = [
    len(caption) + 1
    for pair in (*corpus.train, *corpus.validation)
    for caption in pair.captions
  ]
  long = sum(length > 10 for length in captions)
  assert said == [
    f'Captions longer than data.seq_len = 10 tokens: {long} of 62 (up to 11), '
    'of which the end is not read.'
  ]
  batches.tell_of_long_captions(_config(folder), corpus, TOKENIZER, said.append)
  assert len(said) == 1


def test_frames_make_batches_of_videos(tmp_path):
  lines = [
    dict(frames=[f'{2 * i:03}.png', f'{2 * i + 1:03}.png'], caption=f'v {i}')
    for i in range(4)
  ]
  folder = pairs.write_folder(tmp_path, lines, 8)
  corpus = build_corpus(_config(folder), lambda _: None)
  sizes = dict(batch_size=2, num_lanes=2)
  batch = next(_train(folder, corpus, stored.reader(corpus, S), **sizes))
  assert batch['images'].shape == (2, 2, S, S, 3)


def test_a_batch_has_no_pair_twice(folder, corpus, read):
  number = len(corpus.train)
  with pytest.raises(UserError, match=f'batch_size = 32 .* at most {number},'):
    _train(folder, corpus, read, batch_size=32)


def test_words_of_captions_make_a_small_vocabulary(folder, corpus, tmp_path):
  config = _config(folder, tokenizer='words')
  tokens = make_tokenizer(config, corpus, tmp_path)
  words = {w for p in corpus.train for c in p.captions for w in c.split()}
  # The boundary and what stands for unknown words.
  assert tokens.vocab_size == len(words) + 2
  ids = tokens.encode('Picture RED unheard')
  # A space belongs to the word behind it.
  assert tokens.decode(ids) == 'picture red<unk>'
  again = make_tokenizer(config, corpus, tmp_path)
  assert again.encode('picture red').tolist() == ids.tolist()[:2]


def test_byte_pairs_are_learned_from_captions(folder, corpus, tmp_path):
  config = _config(folder, tokenizer='bpe', bpe_vocab_size=300)
  tokens = make_tokenizer(config, corpus, tmp_path)
  assert len(tokens.encode('picture 3')) < 4


def test_pictures_are_decoded_once_and_a_broken_one_is_named(tmp_path):
  folder = pairs.write_folder(tmp_path, pairs.records(5))
  config = _config(folder)
  corpus = build_corpus(config, lambda _: None)
  pictures = [stored.reader(corpus, S)(i).copy() for i in range(5)]
  for path in (folder / 'images').iterdir():
    path.unlink()
  # The first is decoded to know the shape.
  (folder / 'images' / corpus.train[0].name).write_bytes(
    pairs.png(corpus.train[0].number)
  )
  for i in range(5):
    np.testing.assert_array_equal(stored.reader(corpus, S)(i), pictures[i])
  broken = pairs.write_folder(tmp_path / 'broken', pairs.records(5))
  (broken / 'images' / '003.png').write_bytes(pairs.png(3)[:60])
  corpus = build_corpus(_config(broken), lambda _: None)
  with pytest.raises(UserError, match=r"003.png' is broken"):
    stored.reader(corpus, S)
  assert {path.suffix for path in corpus.directory.iterdir()} == {'.lock'}


def test_of_too_many_pictures_a_broken_one_is_named_as_well(
  tmp_path, monkeypatch
):
  """At the first start; then they are decoded as they are read."""
  monkeypatch.setattr(stored, 'MOST_BYTES', 100)
  folder = pairs.write_folder(tmp_path, pairs.records(5))
  (folder / 'images' / '003.png').write_bytes(pairs.png(3)[:60])
  corpus = build_corpus(_config(folder), lambda _: None)
  for _ in range(2):
    with pytest.raises(UserError, match=r"003.png' is broken"):
      stored.reader(corpus, S)
  (folder / 'images' / '003.png').write_bytes(pairs.png(3))
  corpus = build_corpus(_config(folder), lambda _: None)
  assert stored.reader(corpus, S)(3).shape == (S, S, 3)
  assert not any('.npy' in path.name for path in corpus.directory.iterdir())
  (folder / 'images' / '004.png').unlink()
  read = stored.reader(corpus, S)
  with pytest.raises(UserError, match=r"004.png' cannot be read"):
    read(4)
