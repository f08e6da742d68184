"""Fields that have moved: their dotted names then and now.

Configs that earlier versions saved are read by the old names; on the command
line an old name ends in a sentence with the new one.
"""

from typing import Any

RENAMED = {
  'model.memory.value_dtype': 'model.memory.table.dtype',
  'model.memory.scheme': 'model.memory.table.scheme',
  'model.memory.table_gradient': 'model.memory.table.gradient',
}


def renew(saved: dict[str, Any]) -> None:
  """Puts what an earlier version saved under its present names, in place."""
  memory = _part(saved, 'model.memory')
  if memory and 'value_dtype' in memory and not memory.get('pre_value_dim'):
    # It did nothing without pre-values; now it asks for them.
    memory.pop('pre_value_map', None)
  for old, new in RENAMED.items():
    before, _, name = old.rpartition('.')
    holder = _part(saved, before)
    if holder and name in holder:
      after, _, new_name = new.rpartition('.')
      _part(saved, after)[new_name] = holder.pop(name)


def _part(saved: Any, path: str) -> dict[str, Any] | None:
  """The fields of a part, which is made if the part around it is there."""
  *around, name = path.split('.')
  for part in around:
    saved = saved.get(part) if isinstance(saved, dict) else None
  found = saved.setdefault(name, {}) if isinstance(saved, dict) else None
  return found if isinstance(found, dict) else None
