"""Fields that have moved or are gone: their dotted names then and now.

Configs that earlier versions saved are read by the old names; on the command
line an old name ends in a sentence with the new one.
"""

from typing import Any

from jaxsparse.config.errors import require, shown

RENAMED = {
  'model.dcmha.pre': 'model.dcmha.compose_scores',
  'model.dcmha.post': 'model.dcmha.compose_probs',
  'model.sparse.budget_weight': 'model.sparse.sparsity_loss_weight',
  'model.sparse.budget_ramp': 'model.sparse.sparsity_loss_warmup',
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
      _part(saved, after)[name] = old


def _take(saved: dict[str, Any], path: str) -> list[Any]:
  """Takes out the value at a path, if there is one."""
  *before, name = path.split('.')
  holder = saved
  for part in before:
    holder = holder.get(part) if isinstance(holder, dict) else None
  has_one = isinstance(holder, dict) and name in holder
  return [holder.pop(name)] if has_one else []


def _part(saved: Any, path: str) -> dict[str, Any] | None:
  """The fields of a part, which is made if the part around it is there."""
  *around, name = path.split('.')
  for part in around:
    saved = saved.get(part) if isinstance(saved, dict) else None
  found = saved.setdefault(name, {}) if isinstance(saved, dict) else None
  return found if isinstance(found, dict) else None
