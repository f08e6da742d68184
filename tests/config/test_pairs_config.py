# SPDX-License-Identifier: Apache-2.0
"""Settings of pairs of pictures and captions."""

import pytest

from jaxsparse.config import (
  AugmentConfig,
  Config,
  DataConfig,
  ModelConfig,
  MultiModalConfig,
  TrainConfig,
  saved_config,
)
from jaxsparse.config.errors import UnusedSettingError, UserError
from jaxsparse.run import overrides


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    (dict(pairs='a', text='b'), 'give one of text, tfds, messages and pairs'),
    (dict(pairs='a', held_out='half'), 'held_out must be one of random, group'),
    (dict(tokenizer='words'), "tokenizer = 'words' is of the captions of pai"),
    (dict(augment=AugmentConfig(noise=0.1)), 'augment changes pictures'),
  ],
)
def test_wrong_settings_are_said(fields, words):
  with pytest.raises(UserError, match=words):
    DataConfig(**fields)


@pytest.mark.parametrize(
  ('fields', 'unused'),
  [
    (dict(held_out='group'), 'held_out'),
    (dict(without='skin tone'), 'without'),
    (dict(distractors=True), 'distractors'),
    (dict(pairs='a', augment=AugmentConfig(unknown=0.1)), 'unknown'),
    (dict(image_feature='photo'), 'image_feature'),
    (dict(pairs='a', image_feature='photo'), 'image_feature'),
    (dict(pairs='a', tfds_feature='title'), 'tfds_feature'),
    (dict(pairs='a', split='file'), 'split'),
    (dict(pairs='a', replay='b'), 'replay'),
    (dict(pairs='a', align=8), 'align'),
    (dict(pairs='tfds:a', held_out='group'), 'held_out'),
    (dict(pairs='tfds:a', validation_fraction=0.1), 'validation_fraction'),
    (dict(pairs='generated:frames', test_fraction=0.1), 'test_fraction'),
  ],
)
def test_settings_that_do_nothing_are_refused(fields, unused):
  with pytest.raises(UnusedSettingError, match=f'^{unused} = '):
    DataConfig(**fields)


def test_what_has_an_effect_is_accepted():
  DataConfig(
    pairs='a',
    held_out='group',
    without='b',
    tokenizer='words',
    distractors=True,
    augment=AugmentConfig(noise=0.1, unknown=0.1),
  )
  DataConfig(
    pairs='tfds:a', image_feature='b', tfds_feature='c/d',
    tfds_train_split='train[:9]', tfds_validation_split='train[9:]',
  )  # fmt: skip


@pytest.mark.parametrize(
  'fields', [dict(shift=1.5), dict(crop=1.0), dict(noise=-0.1), dict(flip=2)]
)
def test_changes_of_pictures_are_shares(fields):
  with pytest.raises(UserError, match=f'^{next(iter(fields))} must be'):
    AugmentConfig(**fields)


def test_changes_of_pictures_are_set_and_saved():
  config = Config(
    data=DataConfig(pairs='a'),
    train=TrainConfig(sample_tokens=0),
    model=ModelConfig(is_causal=False),
    multimodal=MultiModalConfig(),
  )
  overrides.apply(config, [('data.augment.noise', '0.1')])
  assert config.data.augment == AugmentConfig(noise=0.1)
  again = saved_config.from_json(saved_config.to_json(config))
  assert again == config
