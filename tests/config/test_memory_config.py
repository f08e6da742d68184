# SPDX-License-Identifier: Apache-2.0
"""Presets of memory layers, and widths that are the model's."""

import dataclasses

import pytest

from jaxsparse.config import MemoryConfig, ModelConfig
from jaxsparse.config.errors import UserError

PRESETS = ('ultramem', 'pkm', 'peer', 'memory_plus', 'ultramem_v2')


@pytest.mark.parametrize('name', PRESETS)
def test_a_preset_is_for_models_of_any_width(name):
  config = getattr(MemoryConfig, name)()
  sized = config.for_width(48)
  assert sized == config.for_width(48).for_width(48)
  assert sized.value_dim == (config.value_dim or 48) > 0
  assert (sized.pre_value_dim > 0) == config.has_pre_values
  model = ModelConfig(model_dim=48, memory=config)
  assert model.memory == config
  assert model.sized_memory == sized


def test_the_models_width_takes_the_place_of_0():
  assert MemoryConfig.pkm().for_width(24).value_dim == 24
  peer = MemoryConfig.peer().for_width(24)
  assert (peer.value_dim, peer.pre_value_dim) == (24, 24)
  assert MemoryConfig.peer(value_dim=24).for_width(24) == peer
  # No pre-values are asked for.
  assert MemoryConfig.pkm().for_width(24).pre_value_dim == 0
  assert ModelConfig().sized_memory is None


def test_memory_plus_has_one_table_of_all_slots():
  assert MemoryConfig.memory_plus().shared_rows == 128**2
  assert MemoryConfig.memory_plus(num_keys=40).shared_rows == 1600
  assert MemoryConfig.memory_plus(num_keys=40, shared_rows=0).shared_rows == 0


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (MemoryConfig.pkm(value_dim=6), r'0 or the model width 8 .*pkm\(\) has it'),
    (MemoryConfig.peer(pre_value_dim=6), r'pre_value_dim .*peer\(\) has it'),
    (MemoryConfig(value_dim=0, num_cores=3), 'multiple of num_cores = 3'),
  ],
)
def test_a_model_refuses_widths_that_are_not_its_own(config, message):
  with pytest.raises(UserError, match=message):
    config.for_width(8)
  with pytest.raises(UserError, match=message):
    ModelConfig(model_dim=8, memory=config)
  if config.value_dim:
    dataclasses.replace(config, value_dim=0, pre_value_dim=0).for_width(8)
