# SPDX-License-Identifier: Apache-2.0
"""Fields that have moved or are gone: their dotted names then and now.

Configs that earlier versions saved are read by the old names; on the command
line an old name ends in a sentence with the new one.
"""

from typing import Any

from jaxsparse.config.errors import require, shown

RENAMED = {
  'model.memory.value_dtype': 'model.memory.table.dtype',
  'model.memory.scheme': 'model.memory.table.scheme',
  'model.memory.table_gradient': 'model.memory.table.gradient',
  'model.moe.num_used': 'model.moe.num_experts_per_token',
  'model.dcmha.pre': 'model.dcmha.compose_scores',
  'model.dcmha.post': 'model.dcmha.compose_probs',
  'model.sparse.budget_weight': 'model.sparse.sparsity_loss_weight',
  'model.sparse.budget_ramp': 'model.sparse.sparsity_loss_warmup',
  'model.use_qk_norm': 'model.qk_norm',
  'model.use_bias': 'model.bias',
}
# Of those that were true or false, what each is now.
VALUES = {
  'model.use_qk_norm': {False: 'none', True: 'head'},
  'model.use_bias': {False: 'none', True: 'all'},
}
# Those that are gone, with the value that all have now.
REMOVED = {
  'model.dcmha.interleave': False,
  'model.sparse.sinks': 1,
  'model.sparse.temperature': 0.1,
  'model.sparse.router_weight': 1.0,
  'model.sparse.summary_key': 'mean',
  'model.sparse.history_summaries': 0,
}
# Those that are gone and change nothing in a run that has begun.
UNNEEDED = ('model.dcmha.init', 'model.sparse.query_chunk')


def renew(saved: dict[str, Any]) -> None:
  """Puts what an earlier version saved under its present names, in place.

  Raises:
    UserError: a field that is gone had another value than all have now.
  """
  _drop_unused_pre_value_map(saved)
  for path in UNNEEDED:
    _take(saved, path)
  for path, value in REMOVED.items():
    for old in _take(saved, path):
      require(
        old == value,
        f'{path} = {shown(old)} of the saved config is gone, this version has '
        f'{value!r} only: use the version of jaxsparse that wrote it.',
      )
  for path, new in RENAMED.items():
    for old in _take(saved, path):
      after, _, name = new.rpartition('.')
      _part(saved, after)[name] = _value(path, old)


def _drop_unused_pre_value_map(saved: dict[str, Any]) -> None:
  """It did nothing without pre-values; now it would ask for them."""
  if not any(_take(saved, 'model.memory.value_dtype', keeps=True)):
    return  # Of this version.
  if not any(_take(saved, 'model.memory.pre_value_dim', keeps=True)):
    _take(saved, 'model.memory.pre_value_map')


def _value(path: str, old: Any) -> Any:
  """What the field of a former name has now; the same if it was damaged."""
  return VALUES[path][old] if path in VALUES and isinstance(old, bool) else old


def _take(saved: dict[str, Any], path: str, keeps: bool = False) -> list[Any]:
  """The value at a path, if there is one; it is taken out unless kept."""
  *before, name = path.split('.')
  holder = saved
  for part in before:
    holder = holder.get(part) if isinstance(holder, dict) else None
  has_one = isinstance(holder, dict) and name in holder
  if not has_one:
    return []
  return [holder[name] if keeps else holder.pop(name)]


def _part(saved: Any, path: str) -> dict[str, Any] | None:
  """The fields of a part, which is made if the part around it is there."""
  *around, name = path.split('.')
  for part in around:
    saved = saved.get(part) if isinstance(saved, dict) else None
  found = saved.setdefault(name, {}) if isinstance(saved, dict) else None
  return found if isinstance(found, dict) else None
