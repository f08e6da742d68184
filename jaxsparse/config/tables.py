# SPDX-License-Identifier: Apache-2.0
"""How the tables of memory layers are stored, split and trained."""

import dataclasses

from jaxsparse.config import fields
from jaxsparse.config.errors import require_choice

TABLE_TYPES = ('float32', 'bfloat16')


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

  def __post_init__(self):
    fields.check(self)
    require_choice(self, 'dtype', TABLE_TYPES)
    require_choice(self, 'scheme', ('auto', 'columns', 'rows', 'grid'))
    require_choice(self, 'gradient', ('scatter', 'sorted', 'deterministic'))
