# SPDX-License-Identifier: Apache-2.0
"""A config as JSON in the workdir, and what changed since it was saved."""

import dataclasses
import json
import types
import typing
from typing import Any

from jaxsparse import config as config_lib
from jaxsparse.config import Config, renamed
from jaxsparse.config.errors import UnusedSettingError, UserError


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
  if 'model_type' in fields and 'model' not in fields:
    raise UserError(
      'config.json is that of a published checkpoint and not of a run: make a '
      'workdir of it by jaxsparse convert from-hf FOLDER --workdir=NEW.'
    )
  renamed.renew(fields)
  try:
    return config_lib.validated(_from_dict(Config, fields))
  except (TypeError, KeyError, AttributeError) as error:
    raise UserError(
      f'the saved config does not fit this version of jaxsparse: {error}.'
    ) from error


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
  is_part = isinstance(hint, type) and dataclasses.is_dataclass(hint)
  if is_part and value is not None:
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
