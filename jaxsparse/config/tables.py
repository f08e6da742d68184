# SPDX-License-Identifier: Apache-2.0
"""How the tables of memory layers are stored, split and trained."""

import dataclasses
from typing import Any

from jaxsparse.config import fields
from jaxsparse.config.errors import require, require_choice

TABLE_TYPES = ('float32', 'bfloat16')
# Where the rows may lie.
STORES = ('device', 'host', 'file')


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class TableConfig:
  """A table of values or pre-values; what it holds is `MemoryConfig`'s."""

  # Type of its rows: 'float32' or 'bfloat16'.
  dtype: str = 'float32'
  # How it is split over devices: 'columns', 'rows', 'grid', or 'auto', the one
  # that sends least and leaves slices wide enough.
  scheme: str = 'auto'
  # How its dense gradient is added up: 'scatter', 'sorted' (fewer atomic
  # additions where rows repeat), or 'deterministic' (to the last bit).
  gradient: str = 'scatter'
  # Where its rows lie in training: 'device'; or in mapped files of the workdir,
  # of which 'file' holds in memory what is in use and 'host' all.
  store: str = 'device'
  # What values begin with: 'normal', drawn as `MemoryConfig.init` says, or
  # 'zeros', which cost nothing on file. Pre-values are always drawn.
  init: str = 'normal'

  def __post_init__(self):
    fields.check(self)
    require_choice(self, 'dtype', TABLE_TYPES)
    require_choice(self, 'scheme', ('auto', 'columns', 'rows', 'grid'))
    require_choice(self, 'gradient', ('scatter', 'sorted', 'deterministic'))
    require_choice(self, 'store', STORES)
    require_choice(self, 'init', ('normal', 'zeros'))


def check_store(table: TableConfig, optimizer: Any) -> None:
  """Refuses what needs whole tables where these are on file.

  Args:
    table: of a memory layer.
    optimizer: the `OptimizerConfig` of the run.

  Raises:
    UserError: it does.
  """
  if table.store == 'device':
    return
  where = f'memory.table.store = {table.store!r}'
  name, decay = optimizer.value_optimizer, optimizer.value_weight_decay
  require(
    name != 'adamw',
    f'value_optimizer must change rows alone with {where}, as '
    "'lazy_row_adam' does; got 'adamw'.",
  )
  require(
    name != 'row_adam' or decay == 0,
    f'value_weight_decay must be 0 with row_adam and {where}, as all rows '
    f'would decay; got {decay}.',
  )
