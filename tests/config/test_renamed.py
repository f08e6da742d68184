# SPDX-License-Identifier: Apache-2.0
"""Fields that have moved are read under their former names."""

import dataclasses
import json

import pytest

from jaxsparse.config import (
  Config,
  MemoryConfig,
  ModelConfig,
  TableConfig,
  fields,
  saved_config,
)
from jaxsparse.config.errors import UserError
from jaxsparse.config.renamed import RENAMED
from jaxsparse.run import overrides

TABLE = TableConfig(dtype='bfloat16', scheme='rows', gradient='deterministic')
CONFIG = Config(
  model=ModelConfig(memory=MemoryConfig(key_dim=8, table=TABLE)),
)


def former(config):
  """What the version before wrote."""
  saved = json.loads(saved_config.to_json(config))
  table = saved['model']['memory'].pop('table')
  saved['model']['memory'] |= dict(
    value_dtype=table['dtype'],
    scheme=table['scheme'],
    table_gradient=table['gradient'],
  )
  return saved


def test_a_former_config_is_read():
  assert saved_config.from_json(json.dumps(former(CONFIG))) == CONFIG


def test_what_did_nothing_still_does_nothing():
  """Without pre-values there was nothing to map."""
  saved = former(CONFIG)
  saved['model']['memory']['pre_value_map'] = False
  assert saved_config.from_json(json.dumps(saved)) == CONFIG


@pytest.mark.parametrize(
  ('before', 'now'),
  [
    (dict(use_qk_norm=True), dict(qk_norm='head')),
    (dict(use_qk_norm=False), dict(qk_norm='none')),
    (dict(use_bias=True), dict(bias='all')),
    (dict(use_bias=False), dict(bias='none')),
  ],
  ids=str,
)
def test_what_was_true_or_false_is_a_word(before, now):
  saved = former(CONFIG)
  for name in now:
    del saved['model'][name]
  saved['model'] |= before
  expected = dataclasses.replace(CONFIG.model, **now)
  assert saved_config.from_json(json.dumps(saved)).model == expected


@pytest.mark.parametrize('value', [[], 'yes', None, 1])
def test_damage_under_a_former_name_is_told(value):
  saved = former(CONFIG)
  saved['model']['use_bias'] = value
  with pytest.raises(UserError, match=r'^bias must be'):
    saved_config.from_json(json.dumps(saved))


def test_an_old_flag_names_the_new_values():
  with pytest.raises(UserError, match="set that one, to 'head' or 'none'"):
    overrides.apply(Config(), [('model.use_qk_norm', 'true')])


def test_a_config_without_the_part_is_read():
  dense = Config()
  assert saved_config.from_json(saved_config.to_json(dense)) == dense


@pytest.mark.parametrize('old', RENAMED)
def test_a_former_name_ends_in_a_sentence_with_the_new_one(old):
  paths = list(fields.paths(Config))
  assert old not in paths
  assert RENAMED[old] in paths
  with pytest.raises(UserError) as raised:
    overrides.apply(Config(), [(old, 'rows')])
  assert f'--config.{RENAMED[old]} now' in str(raised.value)
