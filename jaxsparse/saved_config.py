"""A config as JSON in the workdir, and what changed since it was saved."""

import dataclasses
import json
import types
import typing
from typing import Any

from jaxsparse.config import Config
from jaxsparse.errors import UserError


def to_json(config: Config) -> str:
  return json.dumps(dataclasses.asdict(config), indent=2) + '\n'


def from_json(text: str) -> Config:
  """The config that `to_json` wrote.

  Raises:
    UserError: the text is no JSON, or its fields are not this version's.
  """
  try:
    return _from_dict(Config, json.loads(text))
  except (TypeError, KeyError, AttributeError) as error:
    raise UserError(
      f'the saved config does not fit this version of jaxsparse: {error}.'
    ) from error


def _from_dict(cls: type, fields: dict[str, Any]) -> Any:
  hints = typing.get_type_hints(cls)
  return cls(**{k: _from_value(hints[k], v) for k, v in fields.items()})


def _from_value(hint: Any, value: Any) -> Any:
  if isinstance(hint, types.UnionType):
    hint = next(t for t in typing.get_args(hint) if t is not type(None))
  if dataclasses.is_dataclass(hint) and value is not None:
    return _from_dict(hint, value)
  if isinstance(value, list):
    return tuple(_from_value(None, item) for item in value)
  return value


def differences(old: Any, new: Any, prefix: str = '') -> list[str]:
  """Fields whose values differ, as 'model.num_layers: 4 -> 6'."""
  if not (dataclasses.is_dataclass(old) and type(old) is type(new)):
    return [] if old == new else [f'{prefix}: {old!r} -> {new!r}']
  return [
    line
    for field in dataclasses.fields(old)
    for line in differences(
      getattr(old, field.name),
      getattr(new, field.name),
      f'{prefix}.{field.name}' if prefix else field.name,
    )
  ]
