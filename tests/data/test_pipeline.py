# SPDX-License-Identifier: Apache-2.0
"""Batches: every token once, the same for all processes, resumable anywhere."""

import collections
import itertools
import json
import pathlib

import numpy as np
import pytest
from lanes import few

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import pipeline
from jaxsparse.data.pieces import Corpus, Piece
from jaxsparse.data.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
BOUNDARY = TOKENIZER.boundary_id

# Grain shuffles fewer than these slowly.
NUM_PIECES = 61
EMPTY = 5


def _pieces(num: int, seed: int = 0) -> list[Piece]:
  """Texts that no other equals, some empty, some longer than rows."""
  rng = np.random.default_rng(seed)
  return [
    Piece(
      b'' if i == EMPTY else b'%04d' % i + b'x' * int(rng.integers(0, 70)),
      bool(i == EMPTY or rng.integers(2)),
    )
    for i in range(num)
  ]


@pytest.fixture
def corpus():
  validation = _pieces(29, seed=1)
  return Corpus(
    key='key',
    directory=pathlib.Path(),
    train=_pieces(NUM_PIECES),
    validation=validation,
    test=None,
    validation_bytes=sum(len(piece.text) for piece in validation),
  )


def _config(**fields) -> DataConfig:
  return DataConfig(
    **dict(dict(seq_len=32, batch_size=8, num_lanes=4, prefetch=2), **fields)
  )


def _train(corpus, seed=0, process=(0, 1), **fields) -> pipeline.TrainIterator:
  return pipeline.train_iterator(
    _config(**fields), corpus, TOKENIZER, seed, *process
  )


def _take(batches, num: int) -> list[dict[str, np.ndarray]]:
  return list(itertools.islice(batches, num))


def _assert_equal(a: list, b: list) -> None:
  assert len(a) == len(b) > 0
  for x, y in zip(a, b, strict=True):
    assert x.keys() == y.keys()
    for name in x:
      np.testing.assert_array_equal(x[name], y[name], err_msg=name)


def _pairs(piece: Piece) -> list[tuple[int, int]]:
  """The (token, target) pairs of a piece, written out."""
  sequence = [BOUNDARY, *piece.text] + [BOUNDARY] * piece.ends_document
  return list(itertools.pairwise(sequence))


def _packed_pairs(batches: list) -> list[tuple[int, int]]:
  return [
    (int(token), int(target))
    for batch in batches
    for token, target, weight in zip(
      batch['tokens'].ravel(),
      batch['targets'].ravel(),
      batch['loss_weight'].ravel(),
      strict=True,
    )
    if weight
  ]


def test_batches_are_whole_and_typed(corpus):
  batch = next(_train(corpus))
  kinds = {name: (x.shape, x.dtype.name) for name, x in batch.items()}
  assert kinds == dict(
    tokens=((8, 32), 'int32'),
    targets=((8, 32), 'int32'),
    positions=((8, 32), 'int32'),
    segment_ids=((8, 32), 'int32'),
    loss_weight=((8, 32), 'float32'),
  )
  assert (batch['loss_weight'] == 1).all()


def test_segments_count_from_one_and_positions_restart(corpus):
  for batch in _take(_train(corpus), 20):
    segments, positions = batch['segment_ids'], batch['positions']
    assert (segments[:, 0] == 1).all()
    step = np.diff(segments, axis=1)
    assert set(np.unique(step)) <= {0, 1}
    restarts = np.where(step == 1, 0, positions[:, :-1] + 1)
    np.testing.assert_array_equal(positions[:, 1:], restarts)
    assert (positions[:, 0] == 0).all()
    # A new segment within a row is a new piece; one token feeds the next.
    assert (batch['tokens'][:, 1:][step == 1] == BOUNDARY).all()
    same = step == 0
    np.testing.assert_array_equal(
      batch['tokens'][:, 1:][same], batch['targets'][:, :-1][same]
    )


def test_every_token_is_a_target_once_an_epoch(corpus):
  """One lane, whose order is the shuffled order itself, for three epochs."""
  epochs = 3
  wanted = collections.Counter(
    pair for piece in corpus.train for pair in _pairs(piece)
  )
  num_pairs = wanted.total()
  num_batches = -(-epochs * num_pairs // 256)
  stream = _packed_pairs(_take(_train(corpus, num_lanes=1), num_batches))
  seen = [stream[i * num_pairs : (i + 1) * num_pairs] for i in range(epochs)]
  for epoch in seen:
    assert collections.Counter(epoch) == wanted
  assert seen[0] != seen[1] != seen[2] != seen[0], 'a new order each epoch'


def test_aligned_pieces_begin_at_multiples(corpus):
  """And still every token is a target once an epoch."""
  batches = _take(_train(corpus, num_lanes=1, align=8), 30)
  for batch in batches:
    begins = (batch['segment_ids'] > 0) & (batch['positions'] == 0)
    assert (np.nonzero(begins)[1] % 8 == 0).all()
    np.testing.assert_array_equal(
      batch['loss_weight'], batch['segment_ids'] > 0
    )
  assert any((batch['segment_ids'] == 0).any() for batch in batches)
  wanted = collections.Counter(
    pair for piece in corpus.train for pair in _pairs(piece)
  )
  first_epoch = _packed_pairs(batches)[: wanted.total()]
  assert collections.Counter(first_epoch) == wanted


def _order(batches: list) -> list[int]:
  """Numbers of the pieces that begin in the batches, in order."""
  pairs = _packed_pairs(batches)
  texts = [
    bytes(min(target, 255) for _, target in pairs[i : i + 4])
    for i, (token, _) in enumerate(pairs)
    if token == BOUNDARY
  ]
  # The last number may be cut; what is no number is the empty piece's.
  return [int(t) if t.isdigit() else EMPTY for t in texts if len(t) == 4]


def test_lanes_share_the_shuffled_order_out(corpus):
  """Lane l of 4 holds pieces l, l + 4, ... of the order that one lane holds."""
  order = _order(_take(_train(corpus, num_lanes=1), 20))
  assert sorted(order[:NUM_PIECES]) == list(range(NUM_PIECES))
  batches = _take(_train(corpus), 16)
  for lane in range(4):
    rows = slice(2 * lane, 2 * lane + 2)
    mine = _order([{k: x[rows] for k, x in b.items()} for b in batches])
    wanted = order[lane::4][: len(mine)]
    assert len(wanted) > NUM_PIECES // 4
    assert mine[: len(wanted)] == wanted


def test_seeds_differ_and_repeat(corpus):
  first = _take(_train(corpus, seed=3), 4)
  _assert_equal(first, _take(_train(corpus, seed=3), 4))
  other = _take(_train(corpus, seed=4), 4)
  assert any((a['tokens'] != b['tokens']).any() for a, b in zip(first, other))  # noqa: B905


def _two_epochs(corpus, seed: int) -> list[int]:
  """The order of the pieces in two epochs, and a few more."""
  num_pairs = sum(len(_pairs(piece)) for piece in corpus.train)
  batches = _train(corpus, seed=seed, num_lanes=1)
  return _order(_take(batches, -(-5 * num_pairs // 512)))


def test_neighbouring_seeds_share_no_epoch(corpus):
  """Grain shuffles an epoch by the seed that is one above the last one's."""
  seen = {}
  for seed in range(3):
    order = _two_epochs(corpus, seed)
    for epoch in range(2):
      begin = epoch * NUM_PIECES
      seen[seed, epoch] = tuple(order[begin : begin + NUM_PIECES])
  assert len(set(seen.values())) == len(seen)


def test_the_order_of_the_pieces_is_for_ever(corpus):
  """A saved state holds where in this order it is, not the order."""
  order = _two_epochs(corpus, seed=3)
  assert order[:8] == [19, 52, 55, 35, 41, 57, 60, 30]
  assert order[NUM_PIECES : NUM_PIECES + 8] == [5, 44, 55, 53, 21, 52, 48, 0]


@pytest.mark.parametrize('count', [2, 4])
def test_processes_see_the_same_global_stream(corpus, count):
  whole = _take(_train(corpus), 12)
  parts = [_take(_train(corpus, process=(p, count)), 12) for p in range(count)]
  together = [
    {name: np.concatenate([x[name] for x in rows]) for name in rows[0]}
    for rows in zip(*parts, strict=True)
  ]
  _assert_equal(whole, together)


@pytest.mark.parametrize(
  ('steps', 'prefetch'),
  few(
    [(0, 5), (1, 0), (7, 5), (31, 1)],
    itertools.product([0, 1, 2, 7, 31], [0, 1, 5]),
  ),
)
def test_a_saved_state_goes_on_exactly(corpus, steps, prefetch):
  """31 batches are beyond the second epoch."""
  fields = dict(prefetch=prefetch)
  whole = _take(_train(corpus, **fields), steps + 9)
  saved = _train(corpus, **fields)
  _take(saved, steps)
  state = json.loads(json.dumps(saved.get_state()))
  restored = _train(corpus, **fields)
  restored.set_state(state)
  assert json.loads(json.dumps(restored.get_state())) == state
  _assert_equal(whole[steps:], _take(restored, 9))
  # And back on an iterator that has run ahead.
  restored.set_state(state)
  _assert_equal(whole[steps:], _take(restored, 9))
  # Taking a state disturbs nothing.
  _assert_equal(whole[steps:], _take(saved, 9))


def test_rows_that_end_with_a_piece_restore_exactly():
  """Pieces as long as rows leave no remainder, or all of one."""
  train = [Piece(b'%02d' % i + b'.' * (29 - i % 2), True) for i in range(99)]
  corpus = Corpus(
    key='key', directory=pathlib.Path(), train=train, validation=train,
    test=None, validation_bytes=1,
  )  # fmt: skip
  whole = _take(_train(corpus), 18)
  iterator = _train(corpus)
  for step in range(12):
    restored = _train(corpus)
    restored.set_state(json.loads(json.dumps(iterator.get_state())))
    _assert_equal(whole[step : step + 6], _take(restored, 6))
    next(iterator)


@pytest.mark.parametrize(
  ('before', 'after'), few([(2, 4), (4, 1)], [(2, 4), (4, 1), (1, 2)])
)
def test_a_state_moves_to_another_number_of_processes(corpus, before, after):
  whole = _take(_train(corpus), 12)
  states = []
  for p in range(before):
    iterator = _train(corpus, process=(p, before))
    _take(iterator, 5)
    states.append(json.loads(json.dumps(iterator.get_state())))
  merged = pipeline.merge_states(states)
  parts = []
  for p in range(after):
    iterator = _train(corpus, process=(p, after))
    iterator.set_state(merged)
    parts.append(_take(iterator, 7))
  together = [
    {name: np.concatenate([x[name] for x in rows]) for name in rows[0]}
    for rows in zip(*parts, strict=True)
  ]
  _assert_equal(whole[5:], together)


def test_one_piece_is_enough():
  train = [Piece(b'abc', True)]
  corpus = Corpus(
    key='key', directory=pathlib.Path(), train=train, validation=train,
    test=None, validation_bytes=3,
  )  # fmt: skip
  batch = next(_train(corpus))
  assert bytes(batch['targets'][0, :3].tolist()) == b'abc'


@pytest.mark.parametrize('count', [1, 2, 4])
def test_validation_is_one_pass_in_order(corpus, count):
  parts = [
    list(pipeline.validation_batches(_config(), corpus, TOKENIZER, p, count))
    for p in range(count)
  ]
  assert len({len(part) for part in parts}) == 1
  batches = [
    {name: np.concatenate([x[name] for x in rows]) for name in rows[0]}
    for rows in zip(*parts, strict=True)
  ]
  wanted = [pair for piece in corpus.validation for pair in _pairs(piece)]
  assert _packed_pairs(batches) == wanted
  assert all(batch['tokens'].shape == (8, 32) for batch in batches)
  last = batches[-1]
  padding = last['loss_weight'] == 0
  assert padding.any()
  assert (last['segment_ids'][padding] == 0).all()
  assert (last['segment_ids'][~padding] > 0).all()
  targets = sum((batch['targets'] < 256).sum() for batch in batches)
  assert targets - padding.sum() == corpus.validation_bytes


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (dict(corpus='other'), "corpus = 'other'"),
    (dict(seed=1), 'seed = 1'),
    (dict(num_lanes=2), 'num_lanes = 2'),
    (dict(lanes={}), r'lacks the lanes \[0, 1, 2, 3\]'),
  ],
)
def test_a_state_of_other_data_is_refused(corpus, change, words):
  iterator = _train(corpus)
  with pytest.raises(UserError, match=words):
    iterator.set_state(dict(iterator.get_state(), **change))


def test_processes_that_divide_nothing_are_refused(corpus):
  with pytest.raises(UserError, match='num_lanes = 4 must be a multiple of'):
    _train(corpus, process=(0, 3))
  with pytest.raises(UserError, match='batch_size = 8 must be a multiple of'):
    pipeline.validation_batches(_config(), corpus, TOKENIZER, 0, 3)


def _rows(batches: list) -> collections.Counter:
  return collections.Counter(
    row.tobytes() for batch in batches for row in batch['tokens']
  )


@pytest.mark.parametrize('size', few([4, 12], [4, 6, 12, 16]))
def test_another_batch_size_reads_nothing_twice(corpus, size):
  """Of every lane the next rows come, in whatever batches."""
  saved = _train(corpus, num_lanes=0)
  _take(saved, 3)
  state = json.loads(json.dumps(saved.get_state()))
  iterator = _train(corpus, num_lanes=0, batch_size=size)
  iterator.set_state(state)
  # 48 rows are 6 of each of the 8 lanes.
  batches = _take(iterator, 48 // size)
  assert all(batch['tokens'].shape == (size, 32) for batch in batches)
  assert _rows(batches) == _rows(_take(saved, 6))

  # And so it goes on: restored between two turns, and back to the old size.
  iterator.set_state(state)
  _take(iterator, 1)
  state = json.loads(json.dumps(iterator.get_state()))
  whole = _take(iterator, 5)
  iterator = _train(corpus, num_lanes=0, batch_size=size)
  iterator.set_state(state)
  _assert_equal(_take(iterator, 5), whole)
  parts = []
  for p in range(2):
    part = _train(corpus, num_lanes=0, batch_size=size, process=(p, 2))
    part.set_state(state)
    parts.append(_take(part, 5))
  together = [
    {name: np.concatenate([x[name] for x in rows]) for name in rows[0]}
    for rows in zip(*parts, strict=True)
  ]
  _assert_equal(together, whole)


def test_processes_that_do_not_divide_the_turns_are_refused(corpus):
  state = _train(corpus, batch_size=12, num_lanes=12).get_state()
  iterator = _train(corpus, batch_size=16, num_lanes=0, process=(0, 8))
  with pytest.raises(UserError, match='= 16 and the 12 lanes'):
    iterator.set_state(state)
