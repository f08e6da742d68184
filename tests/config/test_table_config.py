# SPDX-License-Identifier: Apache-2.0
"""Tables on file: what of a run goes with them."""

import pytest

from jaxsparse.config import (
  Config,
  MemoryConfig,
  ModelConfig,
  OptimizerConfig,
  TableConfig,
)
from jaxsparse.config.errors import UserError


@pytest.mark.parametrize(
  ('optimizer', 'words'),
  [
    (dict(value_optimizer='adamw'), "value_optimizer must .*; got 'adamw'"),
    (
      dict(value_optimizer='row_adam', value_weight_decay=0.1),
      'value_weight_decay must be 0 with row_adam .* got 0.1',
    ),
  ],
)
def test_what_needs_whole_tables_is_refused(optimizer, words):
  def run(store):
    memory = MemoryConfig(table=TableConfig(store=store))
    return Config(
      model=ModelConfig(memory=memory), optimizer=OptimizerConfig(**optimizer)
    )

  run('device')
  for store in ('host', 'file'):
    with pytest.raises(UserError, match=words):
      run(store)


def test_names_that_there_are_not_are_refused():
  with pytest.raises(UserError, match=r"store must be .*got 'disk'"):
    TableConfig(store='disk')
  with pytest.raises(UserError, match=r"init must be .*got 'ones'"):
    TableConfig(init='ones')
