# SPDX-License-Identifier: Apache-2.0
"""Fields that have moved are read under their former names."""

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
