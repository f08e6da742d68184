"""The one exception that stands for bad input, and checks that raise it."""

from typing import Any


class UserError(ValueError):
  """Bad input: one sentence that names the field, its value and what is right.

  Entry points print the sentence and exit with 2; every other exception is a
  defect of jaxsparse and keeps its traceback.
  """


def require(condition: bool, message: str) -> None:
  """Raises a `UserError` with `message` unless `condition` holds."""
  if not condition:
    raise UserError(message)


def require_positive(config: Any, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    require(value > 0, f'{name} must be positive, got {value}.')


def require_choice(config: Any, name: str, choices: tuple[str, ...]) -> None:
  value = getattr(config, name)
  require(
    value in choices,
    f'{name} must be one of {", ".join(choices)}; got {value!r}.',
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
