# SPDX-License-Identifier: Apache-2.0
"""Presets of parts for a trained model, which begins as the same function.

How the parts begin, `nn.added_parts` knows.
"""

import dataclasses
from typing import Any

from jaxsparse.config import DCMHAConfig, MemoryConfig, ModelConfig, MoEConfig
from jaxsparse.config.errors import require
from jaxsparse.nn import added_parts

MEMORIES = ('ultramem', 'ultramem_v2', 'memory_plus', 'pkm', 'peer')
PRESETS = (*MEMORIES, 'moe', 'dcmha')

# The field of the model that a preset fills.
_FIELD = dict(moe='moe', dcmha='dcmha') | dict.fromkeys(MEMORIES, 'memory')


def field_of(preset: str) -> str:
  return _FIELD[preset]


def with_part(model: ModelConfig, preset: str) -> ModelConfig:
  """The model with a preset's part, its sizes fitted to it.

  Args:
    model: the trained one.
    preset: one of `PRESETS`.

  Raises:
    UserError: the model has such a part already, or can't have it.
  """
  field = _FIELD[preset]
  require(
    getattr(model, field) is None,
    f'the model has {field} already, so --preset={preset} has nothing to add: '
    'name another workdir or preset.',
  )
  part: Any
  if preset == 'moe':
    part = MoEConfig(expert_dim=model.mlp_dim)
  elif preset == 'dcmha':
    part = DCMHAConfig()
  else:
    part = _memory(model.num_layers, preset)
  return dataclasses.replace(model, **{field: part})


def _memory(num_layers: int, preset: str) -> MemoryConfig:
  """A preset beside the MLPs, which stay."""
  make = getattr(MemoryConfig, preset)
  every = range(num_layers)
  if preset == 'ultramem_v2':
    num_slots = make().num_slots
    return make(
      placements=tuple((i, i) for i in every),
      # As many rows as if every fourth block had a table of its own.
      shared_rows=num_slots * -(-num_layers // 4),
      replaces_mlp=False,
    )
  # A quarter, half and three quarters of the way, or all there are.
  reads = sorted({num_layers * i // 4 for i in (1, 2, 3)})
  # Of UltraMem the lookup runs beside the blocks between.
  ahead = max(1, num_layers // 8) if preset == 'ultramem' else 0
  places = tuple((i, min(i + ahead, num_layers - 1)) for i in reads)
  return make(placements=places, replaces_mlp=False)


def require_same_function(old: ModelConfig, new: ModelConfig, field: str):
  """Checks that nothing but the part was changed, and that it can be silent.

  Raises:
    UserError: another function would begin.
  """
  without = dataclasses.replace(new, **{field: None})
  for one in dataclasses.fields(old):
    before, after = getattr(old, one.name), getattr(without, one.name)
    require(
      before == after,
      f'model.{one.name} = {after!r} is not that of the trained model, '
      f'{before!r}: only fields of model.{field} are free here.',
    )
  added_parts.require_silent(old, new)
