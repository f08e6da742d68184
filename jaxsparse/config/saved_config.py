"""A config as JSON in the workdir, and what changed since it was saved."""

import copy
import dataclasses
import json
import types
import typing
from typing import Any

from jaxsparse import config as config_lib
from jaxsparse.config import Config
from jaxsparse.config.errors import (
  UnusedSettingError,
  UserError,
  require,
  shown,
)

# Fields of former versions, by the names that they have now.
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


class DamagedError(UserError):
  """A saved config of which nothing can be read."""

  def __init__(self, what: str):
    """`what`: says which it is, and what is wrong with it."""
    super().__init__(
      f'{what}, and no checkpoint has a copy: if it is there remove it, and '
      "start train.py with the run's own recipe, which writes it anew."
    )
    self.what = what


def to_json(config: Config) -> str:
  return json.dumps(dataclasses.asdict(config), indent=2) + '\n'


def from_json(text: str) -> Config:
  """The config that `to_json` wrote.

  Raises:
    DamagedError: the text is no JSON object.
    UserError: its fields are not this version's.
  """
  try:
    fields = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise DamagedError('the saved config is damaged') from error
  if not isinstance(fields, dict):
    raise DamagedError('the saved config is damaged')
  try:
    return config_lib.validated(_from_dict(Config, renewed(fields)))
  except (TypeError, KeyError, AttributeError) as error:
    raise UserError(
      f'the saved config does not fit this version of jaxsparse: {error}.'
    ) from error


def renewed(fields: dict[str, Any]) -> dict[str, Any]:
  """The fields of a saved config as this version names them.

  Raises:
    UserError: one that is gone had another value than all have now.
  """
  fields = copy.deepcopy(fields)
  for path in UNNEEDED:
    _taken(fields, path)
  for path, value in REMOVED.items():
    for old in _taken(fields, path):
      require(
        old == value,
        f'{path} = {shown(old)} of the saved config is gone, this version has '
        f'{value!r} only: use the version of jaxsparse that wrote it.',
      )
  for path, new in RENAMED.items():
    for old in _taken(fields, path):
      part, _, name = new.rpartition('.')
      _part(fields, part)[name] = old
  return fields


def _taken(fields: dict[str, Any], path: str) -> list[Any]:
  """Takes out the value at a path, if there is one."""
  part, _, name = path.rpartition('.')
  holder = _part(fields, part)
  return [holder.pop(name)] if name in holder else []


def _part(fields: dict[str, Any], path: str) -> dict[str, Any]:
  """A part of the fields; empty if there is none."""
  for name in path.split('.'):
    fields = fields.get(name) if isinstance(fields, dict) else None
  return fields if isinstance(fields, dict) else {}


def _from_dict(cls: type, fields: dict[str, Any]) -> Any:
  hints = typing.get_type_hints(cls)
  values = {k: _from_value(hints[k], v) for k, v in fields.items()}
  while True:
    try:
      return cls(**values)
    except UnusedSettingError as error:
      # Earlier versions took it, and it did nothing.
      if isinstance(error.config, cls):
        values[error.name] = error.default
      else:
        setattr(error.config, error.name, error.default)


def _from_value(hint: Any, value: Any) -> Any:
  if isinstance(hint, types.UnionType):
    hint = next(t for t in typing.get_args(hint) if t is not type(None))
  if dataclasses.is_dataclass(hint) and value is not None:
    return _from_dict(hint, value)
  if isinstance(value, list):
    return tuple(_from_value(None, item) for item in value)
  return value


def differences(
  old: Any, new: Any, prefix: str = ''
) -> dict[str, tuple[Any, Any]]:
  """Fields whose values differ, as {'model.num_layers': (4, 6)}."""
  if not (dataclasses.is_dataclass(old) and type(old) is type(new)):
    return {} if old == new else {prefix: (old, new)}
  found = {}
  for field in dataclasses.fields(old):
    name = f'{prefix}.{field.name}' if prefix else field.name
    found |= differences(
      getattr(old, field.name), getattr(new, field.name), name
    )
  return found
