# SPDX-License-Identifier: Apache-2.0
"""The one exception that stands for bad input, and checks that raise it."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

# Characters of a value that a sentence repeats.
_SHOWN = 80


class UserError(ValueError):
  """Bad input: one sentence that names the field, its value and what is right.

  Entry points print the sentence and exit with 2; every other exception is a
  defect of jaxsparse and keeps its traceback.
  """


class UnusedSettingError(UserError):
  """A field is set that has no effect beside the others."""

  def __init__(self, message: str, config: Any, name: str, default: Any):
    super().__init__(message)
    self.config, self.name, self.default = config, name, default


def shown(value: Any) -> str:
  """A value as a sentence has it: on one line, and not all of a long one."""
  try:
    text = ' '.join(line.strip() for line in repr(value).splitlines())
  except ValueError:
    # Python refuses to write integers of thousands of digits.
    return 'a number too long to show'
  return text if len(text) <= _SHOWN else f'{text[:_SHOWN]} ...'


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """' (did you mean X?)' with what is most like `name`, or nothing."""
  alike = difflib.get_close_matches(name, list(known), 1)
  return f' (did you mean {alike[0]}?)' if alike else ''


def require(condition: bool, message: str) -> None:
  """Raises a `UserError` with `message` unless `condition` holds."""
  if not condition:
    raise UserError(message)


def require_positive(config: Any, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    require(value > 0, f'{name} must be positive, got {shown(value)}.')


def require_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
  value = getattr(config, name)
  listed = ', '.join(choice or "'' (none)" for choice in choices)
  require(
    value in choices,
    f'{name} must be one of {listed}; got {shown(value)}.',
  )


def require_not_negative(config: Any, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    require(value >= 0, f'{name} must not be negative, got {value}.')


def require_fraction(config: Any, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    require(0 <= value <= 1, f'{name} must be within 0 and 1, got {value}.')


def require_utf8(name: str, text: str) -> None:
  """Refuses what the command line had in bytes that are no UTF-8."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'{name} must be UTF-8 text, but its character {error.start + 1} '
      'stands for a byte that is not.'
    ) from error


def require_at_most(config: Any, most: int, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    require(
      value <= most, f'{name} must be at most {most:,}, got {shown(value)}.'
    )


def require_unset(config: Any, is_unused: bool, why: str, *names: str) -> None:
  """Refuses settings that would do nothing.

  Args:
    config: whose fields they are.
    is_unused: whether the fields have no effect.
    why: the setting that leaves them without one, such as "grid = 'additive'".
    names: of fields; each may have its default, or be a 0 that turns it off.

  Raises:
    UnusedSettingError: one of them is set.
  """
  if not is_unused:
    return
  defaults = {
    field.name: field.default for field in dataclasses.fields(type(config))
  }
  for name in names:
    value = getattr(config, name)
    is_off = not isinstance(value, bool) and value == 0
    if not (is_off or value == defaults[name]):
      raise UnusedSettingError(
        f'{name} = {shown(value)} does nothing with {why}: set it to '
        f'{defaults[name]!r}, its default, or change the latter.',
        config,
        name,
        defaults[name],
      )
