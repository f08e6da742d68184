# SPDX-License-Identifier: Apache-2.0
"""Needles: documents from a seed, whole rows of them, and what is found."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_suite import facts_suite

from jaxsparse.config import DataConfig, SparseAttentionConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import needles, pipeline, tokenizer
from jaxsparse.data.corpus import build_corpus
from jaxsparse.data.needles import Needles
from jaxsparse.experiments.compare import retrieval, runs
from jaxsparse.experiments.compare.suite import Architecture
from jaxsparse.run.progress import Reporter

SMALL = Needles(
  num_needles=4, num_fillers=3, gap=2, num_documents=12, num_validation=3
)


pytestmark = pytest.mark.usefixtures('one_device')


@pytest.fixture(scope='module')
def words(tmp_path_factory):
  path = tmp_path_factory.mktemp('needles') / 'tokenizer.json'
  path.write_text(needles.make_tokenizer().to_str())
  return tokenizer.load_from_workdir(path.parent)


def test_an_answer_repeats_its_needle_after_its_question(words):
  encoding = needles.make_tokenizer()
  for document in needles.documents(Needles(), 5, 3, 'test'):
    tokens = encoding.encode(document.text).tokens
    assert ''.join(tokens) == document.text
    assert len(tokens) + 1 == Needles().seq_len == 128
    assert '<unk>' not in tokens
    asked = set()
    for answer, place in zip(document.answers, document.places, strict=True):
      assert tokens[answer] == tokens[place]
      assert tokens.count(tokens[place]) == 2
      name = tokens[place].split()[0]
      assert tokens[answer - 1] == f'Where does {name} live? '
      assert place < 21 + 4 * 10
      assert answer > place + 4 * 6
      asked.add(name)
    assert len(asked) == 21


def test_documents_are_those_of_seed_and_part():
  def texts(seed, part):
    return [d.text for d in needles.documents(SMALL, 3, seed, part)]

  assert texts(1, 'test') == texts(1, 'test')
  others = [texts(2, 'test'), texts(1, 'train'), texts(1, 'validation')]
  assert all(texts(1, 'test') != other for other in others)


def test_every_row_is_one_document(words, tmp_path):
  fields = needles.write(tmp_path, SMALL, seed=5)
  assert needles.write(tmp_path, SMALL, seed=5) == fields
  data = DataConfig(
    **fields,
    seq_len=SMALL.seq_len,
    batch_size=2,
    cache_dir=str(tmp_path / 'cache'),
  )
  corpus = build_corpus(data, lambda line: None)
  iterator = pipeline.train_iterator(data, corpus, words, seed=0)
  boundary = words.boundary_id
  seen = set()
  for batch in itertools.islice(iterator, 6):
    assert (batch['tokens'][:, 0] == boundary).all()
    assert (batch['targets'][:, -1] == boundary).all()
    assert (batch['segment_ids'] == 1).all()
    seen |= {row.tobytes() for row in batch['tokens']}
  iterator.close()
  assert len(seen) == SMALL.num_documents
  rows = [
    row
    for batch in pipeline.validation_batches(data, corpus, words)
    for row in batch['tokens']
    if row.any()
  ]
  texts = [words.decode(row[1:].tolist()) for row in rows]
  expected = needles.documents(SMALL, 3, 5, 'validation')
  assert texts == [document.text for document in expected]


def test_other_needles_do_not_join_those_that_are_there(tmp_path):
  first = needles.write(tmp_path, SMALL, seed=5)
  second = needles.write(tmp_path, SMALL, seed=6)
  assert first['text'] != second['text']


def oracle(vocab_size):
  return lambda batch: jax.nn.one_hot(batch['targets'], vocab_size)


def test_who_knows_all_finds_all(words):
  found = retrieval.measure(oracle(words.vocab_size), words, SMALL, 0)
  assert found.share == 1
  assert found.share_by_depth == (1,) * 4
  assert found.num_questions == 256 * 4


def test_who_sees_one_part_finds_that_part(words):
  """The first quarter of a haystack of 16 tokens, after the boundary."""
  documents = needles.documents(SMALL, 256, 0, 'test')
  is_first = np.array([d.places for d in documents]) < 4

  def sees_the_first_four(batch):
    early = batch['tokens'][:, None, 1:5]
    is_known = (batch['targets'][:, :, None] == early).any(-1)
    known = jnp.where(is_known, batch['targets'], 0)
    return jax.nn.one_hot(known, words.vocab_size)

  found = retrieval.measure(sees_the_first_four, words, SMALL, 0)
  assert found.share == pytest.approx(is_first.mean())
  assert found.share_by_depth == (1, 0, 0, 0)


@pytest.mark.slow
def test_a_comparison_asks_for_needles(tmp_path):
  suite = facts_suite(tmp_path, people=())
  data = dataclasses.replace(suite.base.data, seq_len=SMALL.seq_len)
  model = dataclasses.replace(suite.base.model, vocab_size=needles.VOCAB_SIZE)
  suite = dataclasses.replace(
    suite,
    base=dataclasses.replace(suite.base, data=data, model=model),
    architectures=dict(
      dense=Architecture(
        model=dict(
          attention_pattern=('sparse',),
          sparse=SparseAttentionConfig(
            block=4, tile=2, window_blocks=1, max_blocks=1
          ),
        )
      )
    ),
    needles=SMALL,
  )
  (run,) = runs.plan(suite, str(tmp_path))
  assert runs.finished(run) is None
  result = runs.train(run, Reporter())
  assert result['num_questions'] == 256 * 4
  assert 0 <= result['needles_found'] <= 1
  assert 0 < result['kept_share'] < 1
  assert runs.finished(run) == result
  more = dataclasses.replace(run, needles=dataclasses.replace(SMALL, gap=3))
  with pytest.raises(UserError, match='is the result of another config'):
    runs.finished(more)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(num_needles=33), 'num_needles must be 1 to 32, got 33'),
    (dict(gap=-1), 'num_fillers and gap must be at least 0, got 10 and -1'),
    (dict(num_documents=0), 'num_documents and num_validation must be'),
  ],
)
def test_needles_refuse(fields, message):
  with pytest.raises(UserError, match=message):
    Needles(**fields)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match="can't be written"):
    needles.write(tmp_path / 'file', SMALL, 0)
