# SPDX-License-Identifier: Apache-2.0
"""TensorFlow Datasets by name and by directory; nothing is fetched."""

import urllib.request

import numpy as np
import pytest
import tensorflow_datasets as tfds

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import compression, named_dataset
from jaxsparse.data.corpus import build_corpus


class TinyReviews(tfds.core.GeneratorBasedBuilder):
  """A registered dataset that needs no download."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      disable_shuffling=True,
      features=tfds.features.FeaturesDict(
        {
          'review': tfds.features.Text(),
          'title': tfds.features.Text(),
          'stars': tfds.features.Scalar(dtype=np.int64),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {
      'train': self._generate_examples(20),
      'test': self._generate_examples(5),
    }

  def _generate_examples(self, num):
    for i in range(num):
      text = f'film č. {i} 🙂'
      yield i, {'review': text, 'title': '', 'stars': i}


@pytest.fixture
def prepared(tmp_path):
  builder = TinyReviews(data_dir=tmp_path / 'tfds', file_format='array_record')
  builder.download_and_prepare()
  return str(builder.data_path)


def _config(tmp_path, name, **fields) -> DataConfig:
  return DataConfig(
    tfds=name, cache_dir=str(tmp_path / 'cache'),
    **dict(dict(tfds_feature='review'), **fields),
  )  # fmt: skip


def test_a_directory_gives_whole_documents_in_order(tmp_path, prepared):
  corpus = build_corpus(_config(tmp_path, prepared))
  wanted = [(f'film č. {i} 🙂'.encode(), True) for i in range(20)]
  assert list(corpus.train) == wanted
  assert list(corpus.validation) == wanted[:5]
  assert corpus.validation_bytes == sum(len(text) for text, _ in wanted[:5])
  assert compression.bits_per_byte(corpus)['gzip'] > 0


def test_splits_may_be_slices(tmp_path, prepared):
  fields = dict(
    tfds_train_split='train[:80%]', tfds_validation_split='train[80%:]'
  )
  corpus = build_corpus(_config(tmp_path, prepared, **fields))
  assert (len(corpus.train), len(corpus.validation)) == (16, 4)
  assert corpus.key != build_corpus(_config(tmp_path, prepared)).key


def test_a_registered_name_is_prepared_where_it_needs_to_be(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path / 'tfds'))
  said = []
  for _ in range(2):
    config = _config(tmp_path, 'tiny_reviews')
    assert len(build_corpus(config, said.append).train) == 20
  assert len(said) == 1


def test_mock_data_stands_in(tmp_path):
  with tfds.testing.mock_data(num_examples=7):
    train, validation, name = named_dataset.read(
      _config(tmp_path, 'tiny_reviews')
    )
    assert name == 'tiny_reviews/1.0.0'
    assert len(train) == len(validation) == 7
    assert isinstance(train[0].text, bytes)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    (dict(tfds_feature='text'), "'text' is no text of .*: its texts are"),
    (dict(tfds_feature='stars'), "'stars' is no text of"),
    (dict(tfds_train_split='dev'), "'dev' names no documents .* are train"),
    (dict(tfds_validation_split='test['), "'test.' names no documents"),
    (dict(tfds_train_split='train[:0]'), 'names no documents of'),
    (dict(tfds_feature='title'), 'holds only empty texts'),
  ],
)
def test_what_the_dataset_lacks_is_named(tmp_path, prepared, fields, words):
  with pytest.raises(UserError, match=words):
    build_corpus(_config(tmp_path, prepared, **fields))


@pytest.mark.parametrize(
  ('name', 'words'),
  [
    ('no_such_dataset', 'is unknown'),
    ('no such name', 'cannot be opened'),
    ('caf\udce9', 'cannot be opened'),
  ],
)
def test_an_unknown_name_is_refused(tmp_path, name, words):
  with pytest.raises(UserError, match=words) as error:
    build_corpus(_config(tmp_path, name))
  str(error.value).encode()


def test_a_name_out_of_reach_is_refused_at_once(tmp_path, monkeypatch):
  def refuse(request, timeout):
    raise OSError('no route to host')

  monkeypatch.setattr(urllib.request, 'urlopen', refuse)
  monkeypatch.setattr(tfds.core.constants, 'DATA_DIR', str(tmp_path / 'tfds'))
  config = _config(tmp_path, 'lm1b', tfds_feature='text')
  with pytest.raises(UserError, match=r'www.statmt.org cannot be reached'):
    build_corpus(config)


def test_another_format_is_refused(tmp_path, prepared, monkeypatch):
  def refuse(self, split, decoders):
    raise NotImplementedError('tfrecord')

  monkeypatch.setattr(tfds.core.DatasetBuilder, 'as_data_source', refuse)
  with pytest.raises(UserError, match='without random access'):
    build_corpus(_config(tmp_path, prepared))
