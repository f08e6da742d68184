# SPDX-License-Identifier: Apache-2.0
"""Replay: old text in its share of the rows, and a stream that goes on."""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
import pytest

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import pipeline
from jaxsparse.data.corpus import build_corpus
from jaxsparse.data.pieces import Answers, Corpus, Piece
from jaxsparse.data.tokenizer import ByteTokenizer

BYTES = ByteTokenizer()
OLD, NEW = b'o', b'n'


def text_of(letter: bytes) -> Corpus:
  # Grain shuffles fewer than these slowly.
  pieces = [Piece(letter * (20 + i % 40), True) for i in range(64)]
  return Corpus(
    key=letter.decode(), directory=pathlib.Path(), train=pieces,
    validation=pieces[:3], test=None, validation_bytes=60,
  )  # fmt: skip


CORPUS = dataclasses.replace(text_of(NEW), before=text_of(OLD))


def stream(process=(0, 1), **fields):
  fields = dict(dict(replay='old', num_lanes=4), **fields)
  if fields['replay']:
    fields = dict(dict(replay_share=0.25), **fields)
  config = DataConfig(seq_len=32, batch_size=8, prefetch=2, **fields)
  return pipeline.train_iterator(config, CORPUS, BYTES, 0, *process)


def take(batches, num):
  return list(itertools.islice(batches, num))


def is_old(batch) -> np.ndarray:
  """Of each row; none is of both texts."""
  found = [np.isin(batch['targets'], [*x]).any(1) for x in (OLD, NEW)]
  assert (found[0] != found[1]).all()
  return found[0]


def assert_equal(some, others):
  for a, b in zip(some, others, strict=True):
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize(
  ('share', 'each'), [(0.25, {2}), (0.05, {0, 1}), (0.5, {4}), (0.9, {7, 8})]
)
def test_each_batch_has_its_share_of_old_rows(share, each):
  counts = [int(is_old(b).sum()) for b in take(stream(replay_share=share), 40)]
  assert set(counts) == each
  assert abs(sum(counts) - 40 * 8 * share) <= 1


def test_both_streams_are_those_that_each_text_has_alone():
  """Replay skips nothing of the new text."""
  mixed = take(stream(num_lanes=1), 12)
  alone = take(stream(num_lanes=1, replay=''), 9)
  rows = [row for b in mixed for row in b['tokens'][~is_old(b)]]
  wanted = [row for b in alone for row in b['tokens']]
  np.testing.assert_array_equal(rows, wanted)


def test_a_share_of_0_reads_none():
  assert_equal(
    take(stream(replay_share=0.0), 5),
    take(stream(replay=''), 5),
  )


@pytest.mark.parametrize('steps', [1, 6])
def test_a_saved_state_goes_on_exactly(steps):
  whole = take(stream(), steps + 6)
  saved = stream()
  take(saved, steps)
  again = stream()
  again.set_state(json.loads(json.dumps(saved.get_state())))
  assert_equal(whole[steps:], take(again, 6))


def test_processes_share_the_stream_and_its_state():
  whole = take(stream(), 9)
  parts = [stream(process=(p, 4)) for p in range(4)]
  rows = [take(part, 4) for part in parts]
  merged = pipeline.merge_states([part.get_state() for part in parts])
  assert_equal(whole[:4], _joined(rows))
  parts = [stream(process=(p, 2)) for p in range(2)]
  for part in parts:
    part.set_state(json.loads(json.dumps(merged)))
  assert_equal(whole[4:], _joined([take(part, 5) for part in parts]))


def _joined(parts):
  return [
    {name: np.concatenate([x[name] for x in rows]) for name in rows[0]}
    for rows in zip(*parts, strict=True)
  ]


def test_a_state_with_other_replay_is_refused():
  state = stream().get_state()
  with pytest.raises(UserError, match="replay = 'o' and the run has None"):
    stream(replay='').set_state(state)
  # States of earlier versions name none.
  plain = stream(replay='').get_state()
  del plain['replay']
  stream(replay='').set_state(plain)


def test_chats_go_beside_old_text(tmp_path):
  """Rows of both kinds make one batch, and text has a weight on every token."""
  chats = [
    Answers(
      np.array([256, *b'n' * (4 + i % 9)], np.int32),
      np.arange(5 + i % 9) > 2,
      b'n' * (2 + i % 9),
    )
    for i in range(64)
  ]
  corpus = dataclasses.replace(CORPUS, train=chats, has_chats=True)
  config = DataConfig(
    seq_len=32, batch_size=8, num_lanes=4, replay='old', replay_share=0.25
  )
  for batch in take(pipeline.train_iterator(config, corpus, BYTES, 0), 5):
    old = is_old(batch)
    assert old.sum() == 2
    assert (batch['loss_weight'][old] == 1).all()
    new = batch['loss_weight'][~old]
    assert 0 < new.sum() < (batch['segment_ids'][~old] > 0).sum()
    assert {x.dtype.name for x in batch.values()} == {'int32', 'float32'}


def test_a_corpus_has_its_replay_beside_it(tmp_path):
  for name in ('new', 'old'):
    (tmp_path / name).write_text(f'{name} text\n' * 2000)
  config = DataConfig(
    text=str(tmp_path / 'new'),
    replay=str(tmp_path / 'old'),
    cache_dir=str(tmp_path / 'cache'),
  )
  corpus = build_corpus(config, lambda _: None)
  assert b'new text' in corpus.train[0].text
  assert b'old text' in corpus.before.train[0].text
  alone = build_corpus(
    DataConfig(text=config.replay, cache_dir=config.cache_dir), lambda _: None
  )
  assert corpus.before.key == alone.key
  with pytest.raises(UserError, match=r'data\.replay = .*names no file'):
    build_corpus(dataclasses.replace(config, replay=str(tmp_path / 'none')))
