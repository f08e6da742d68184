# SPDX-License-Identifier: Apache-2.0
"""Pairs of TensorFlow Datasets; nothing is fetched."""

import io

import numpy as np
import pairs
import pytest
import tensorflow_datasets as tfds

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data.corpus import build_corpus
from jaxsparse.data.pictures import decode

FEATURES = {
  'photo': tfds.features.Image(),
  'title': tfds.features.Text(),
  'captions': tfds.features.Sequence({'text': tfds.features.Text()}),
  'tags': tfds.features.Sequence(tfds.features.Text()),
  'views': tfds.features.Sequence(tfds.features.Image()),
  'stars': tfds.features.Scalar(dtype=np.int64),
}


class TinyPictures(tfds.core.GeneratorBasedBuilder):
  """A dataset that needs no download."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self,
      disable_shuffling=True,
      features=tfds.features.FeaturesDict(FEATURES),
    )

  def _split_generators(self, dl_manager):
    return {
      'train': self._generate_examples(0, 6),
      'test': self._generate_examples(6, 9),
    }

  def _generate_examples(self, start, stop):
    for i in range(start, stop):
      yield (
        i,
        dict(
          photo=io.BytesIO(pairs.png(i)),
          title=f'title {i}',
          captions=[dict(text=f'one {i}'), dict(text=f'two {i}')],
          tags=['' if i == 2 else f'tag {i}'],
          views=[],
          stars=i,
        ),
      )


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  builder = TinyPictures(
    data_dir=tmp_path_factory.mktemp('tfds'), file_format='array_record'
  )
  builder.download_and_prepare()
  return str(builder.data_path)


def _corpus(tmp_path, prepared, **fields):
  config = DataConfig(
    pairs=f'tfds:{prepared}', cache_dir=str(tmp_path),
    **dict(dict(image_feature='photo', tfds_feature='title'), **fields),
  )  # fmt: skip
  return build_corpus(config, lambda _: None)


def test_both_splits_are_the_datasets_own(tmp_path, prepared):
  corpus = _corpus(tmp_path, prepared)
  assert [p.captions for p in corpus.train] == [
    (f'title {i}',) for i in range(6)
  ]
  assert [p.captions[0] for p in corpus.validation] == [
    f'title {i}' for i in range(6, 9)
  ]
  for pair, i in ((corpus.train[4], 4), (corpus.validation[1], 7)):
    np.testing.assert_array_equal(
      corpus.pictures.picture(pair.number, 8),
      decode.read_picture(pairs.png(i), 8),
    )


def test_several_captions_of_one_picture(tmp_path, prepared):
  corpus = _corpus(tmp_path, prepared, tfds_feature='captions/text')
  assert corpus.train[3].captions == ('one 3', 'two 3')


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    (
      dict(image_feature='image'),
      "data.image_feature = 'image' is no picture of .*: its pictures are "
      'photo.',
    ),
    (
      dict(tfds_feature='text'),
      "data.tfds_feature = 'text' is no text of .*: its texts are captions/tex"
      't, tags, title.',
    ),
    (dict(image_feature='views'), 'is no picture of'),
    (dict(tfds_feature='tags'), 'the caption of example 2 of train .* is empt'),
    (dict(tfds_train_split='dev'), "data.tfds_train_split = 'dev' names no"),
  ],
)
def test_what_the_dataset_lacks_is_named(tmp_path, prepared, fields, words):
  with pytest.raises(UserError, match=words):
    _corpus(tmp_path, prepared, **fields)


def test_an_unknown_name_is_said_of_the_pairs(tmp_path):
  with pytest.raises(UserError, match=r"data.pairs = 'no_such_set' is unknown"):
    _corpus(tmp_path, 'no_such_set')
