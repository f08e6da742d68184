# SPDX-License-Identifier: Apache-2.0
"""Fields of a recipe that the command line sets: `--config.a.b=value`."""

import difflib
from collections.abc import Sequence
from typing import Any

from jaxsparse.config import Config, fields, renamed
from jaxsparse.config.errors import UserError, shown

_PREFIX = '--config.'

# The field to set, by its dotted name, and the text of its value.
Override = tuple[str, str]


def split(arguments: Sequence[str]) -> tuple[list[Override], list[str]]:
  """The overrides among the arguments, and the others.

  A value follows after `=`, or as the next argument; without one a field is
  set to true.
  """
  found, others = [], []
  left = list(arguments)
  while left:
    argument = left.pop(0)
    if not argument.startswith(_PREFIX):
      others.append(argument)
      continue
    path, has_value, value = argument.removeprefix(_PREFIX).partition('=')
    if not has_value:
      is_next = bool(left) and not left[0].startswith('--')
      value = left.pop(0) if is_next else 'true'
    found.append((path, value))
  return found, others


def apply(config: Config, overrides: Sequence[Override]) -> list[str]:
  """Sets fields of `config`, one after another; nothing else is checked yet.

  A part that the config has not, such as its memory, is made with its defaults
  by the first field of it that is set.

  Returns:
    A sentence about each part that was made so.

  Raises:
    UserError: there is no such field, or it can't have such a value.
  """
  notes = []
  for path, text in overrides:
    *parts, name = path.split('.')
    holder, so_far = config, []
    for part in parts:
      so_far.append(part)
      cls = _part(holder, part, path)
      if getattr(holder, part) is None:
        setattr(holder, part, cls())
        notes.append(_note('.'.join(so_far), path))
      holder = getattr(holder, part)
    hint = fields.hints(type(holder)).get(name)
    if hint is None:
      raise _no_field(path)
    setattr(holder, name, _value(path, text, hint))
  return notes


def suggestion(name: str, flags: Sequence[str] = ()) -> str:
  """' (did you mean --config.a.b?)' for a name that is no field's or flag's.

  Args:
    name: as it was written.
    flags: others that could be meant.
  """
  name = name.lstrip('-').removeprefix('config.')
  last = name.rpartition('.')[2]
  meant = {flag.lstrip('-'): flag for flag in flags}
  for path in fields.paths(Config):
    # What only lacks its section is a field's, and no flag's with a typo.
    meant.setdefault(path.rpartition('.')[2], _PREFIX + path)
    meant[path] = _PREFIX + path
  if last in meant:
    return f' (did you mean {meant[last]}?)'
  for text in (name, last):
    for alike in difflib.get_close_matches(text, meant, 1):
      return f' (did you mean {meant[alike]}?)'
  return ''


def _part(holder: Any, name: str, path: str) -> type:
  """The class of the part `name`, on the way to `path`."""
  cls = fields.part_of(fields.hints(type(holder)).get(name, str))
  if cls is None:
    raise _no_field(path)
  return cls


def _value(path: str, text: str, hint: Any) -> Any:
  part = fields.part_of(hint)
  if part and not (text == 'None' and hint is not part):
    first = next(iter(fields.hints(part)))
    raise UserError(
      f'{_PREFIX}{path} has fields of its own: set one of them, such as '
      f'{_PREFIX}{path}.{first}.'
    )
  try:
    return fields.parse(text, hint)
  except ValueError:
    raise UserError(
      f'{_PREFIX}{path} must be {fields.name_of(hint)}, got {shown(text)}.'
    ) from None


def _no_field(path: str) -> UserError:
  if new := renamed.RENAMED.get(path):
    now = f'{_PREFIX}{path} is {_PREFIX}{new} now: set that one'
    values = renamed.VALUES.get(path)
    said = f", to '{values[True]}' or '{values[False]}'" if values else ''
    return UserError(f'{now}{said}.')
  if path in renamed.REMOVED:
    value = renamed.REMOVED[path]
    return UserError(f'{_PREFIX}{path} is gone: it is always {value!r}.')
  if path in renamed.UNNEEDED:
    return UserError(f'{_PREFIX}{path} is gone: nothing needs it.')
  return UserError(
    f'there is no field {shown(_PREFIX + path)[1:-1]}{suggestion(path)}; '
    '--help=all lists every field.'
  )


def _note(part: str, path: str) -> str:
  return (
    f'The recipe has no {part}, so {_PREFIX}{path} makes one with the defaults '
    f'of --help={part.rpartition(".")[2]}.'
  )
