# SPDX-License-Identifier: Apache-2.0
"""Pictures in the config of a run: as flags, saved, and refused."""

import json

import pytest

from jaxsparse.config import (
  Config,
  DataConfig,
  ModelConfig,
  MultiModalConfig,
  TrainConfig,
  saved_config,
  validated,
)
from jaxsparse.config.errors import UserError
from jaxsparse.run import overrides

ENCODER = ModelConfig(is_causal=False)
PAIRS = dict(
  data=DataConfig(pairs='some'), train=TrainConfig(sample_tokens=0)
)  # fmt: skip


def test_a_config_of_pictures_is_saved_and_read():
  settings = MultiModalConfig(fused_dim=7)
  config = Config(model=ENCODER, multimodal=settings, **PAIRS)
  assert saved_config.from_json(saved_config.to_json(config)) == config


def test_a_config_of_before_has_none():
  saved = json.loads(saved_config.to_json(Config()))
  del saved['multimodal']
  del saved['model']['is_causal']
  assert saved_config.from_json(json.dumps(saved)) == Config()


def test_flags_make_the_parts_that_they_name():
  config = Config()
  flags = [
    ('model.is_causal', 'false'),
    ('data.pairs', 'some'),
    ('train.sample_tokens', '0'),
    ('multimodal.vision.patch_size', '8'),
    ('multimodal.vision.stream.num_layers', '2'),
  ]
  overrides.apply(config, flags)
  config = validated(config)
  assert config.multimodal.vision.num_patches == 28**2
  assert config.multimodal.vision.stream.num_layers == 2
  # The next one begins anew.
  assert MultiModalConfig().vision.stream.num_layers == 12


def test_an_encoder_is_no_language_model():
  with pytest.raises(UserError, match='see the token that it is to predict'):
    Config(model=ENCODER)


def test_streams_that_do_not_fit_each_other():
  with pytest.raises(UserError, match='must be True for captions'):
    Config(
      model=ENCODER, multimodal=MultiModalConfig(caption_weight=1.0), **PAIRS
    )
