"""Which changes of a config a workdir's run can go on with."""

import dataclasses

import pytest

from jaxsparse.config import Config, MemoryConfig, ModelConfig
from jaxsparse.errors import UserError
from jaxsparse.training.resume import claim_workdir, save_config

CONFIG = Config(model=ModelConfig(memory=MemoryConfig()))


def changed(section, **fields):
  if section == 'memory':
    memory = dataclasses.replace(CONFIG.model.memory, **fields)
    section, fields = 'model', dict(memory=memory)
  inner = dataclasses.replace(getattr(CONFIG, section), **fields)
  return dataclasses.replace(CONFIG, **{section: inner})


@pytest.mark.parametrize(
  ('config', 'change'),
  [
    (changed('memory', scheme='rows'), "scheme: 'auto' -> 'rows'"),
    (changed('memory', table_gradient='sorted'), 'table_gradient'),
    (changed('optimizer', value_row_budget=9), 'value_row_budget: 0 -> 9'),
    (changed('optimizer', value_lr_multiplier=2.0), 'value_lr_multiplier'),
    (changed('mesh', sparse=2), 'mesh.sparse: 1 -> 2'),
  ],
)
def test_accepted(config, change, tmp_path):
  save_config(CONFIG, tmp_path)
  _, (told,) = claim_workdir(config, tmp_path)
  assert change in told


@pytest.mark.parametrize(
  ('config', 'change'),
  [
    (changed('optimizer', value_optimizer='row_adam'), 'value_optimizer'),
    (changed('optimizer', value_master=True), 'value_master: False -> True'),
    (changed('optimizer', value_weight_decay=0.1), 'value_weight_decay'),
    (changed('memory', value_dtype='bfloat16'), 'value_dtype'),
  ],
)
def test_refused_as_the_state_would_not_fit(config, change, tmp_path):
  save_config(CONFIG, tmp_path)
  with pytest.raises(UserError, match=change):
    claim_workdir(config, tmp_path)
