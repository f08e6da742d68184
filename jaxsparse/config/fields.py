# SPDX-License-Identifier: Apache-2.0
"""Fields of the configuration classes: their types, limits and texts.

One place knows what an annotation such as `tuple[str, ...]` or
`MemoryConfig | None` allows, so that a class checks its values by it and the
command line reads text by it.
"""

import ast
import dataclasses
import functools
import math
import types
import typing
import warnings
from collections.abc import Iterator
from typing import Any

from jaxsparse.config.errors import UserError, require, shown

# Every number is a dimension, a count or a seed, and arrays are indexed by
# int32.
MOST = 2**31 - 1
_MOST_FLOAT = (2 - 2**-23) * 2.0**127

_NONE = type(None)
_NAMES = {
  int: 'a whole number',
  float: 'a number',
  bool: 'true or false',
  str: 'text',
  _NONE: 'None',
}
_WORDS = {'true': True, '1': True, 'false': False, '0': False}


@functools.cache
def hints(cls: type) -> dict[str, Any]:
  """The types of the fields of a configuration class."""
  found = typing.get_type_hints(cls)
  return {f.name: found[f.name] for f in dataclasses.fields(cls)}


def part_of(hint: Any) -> type | None:
  """The class of a field that is a part itself, present or not."""
  for option in _options(hint):
    if isinstance(option, type) and dataclasses.is_dataclass(option):
      return option
  return None


def paths(cls: type, prefix: str = '') -> Iterator[str]:
  """The dotted names of all fields, those of parts among them."""
  for name, hint in hints(cls).items():
    part = part_of(hint)
    if part:
      yield from paths(part, f'{prefix}{name}.')
    else:
      yield f'{prefix}{name}'


def check(config: Any) -> None:
  """Checks that every field is of its type, finite, and of a size that can be.

  Raises:
    UserError: one sentence that names the field, its value and what is right.
  """
  for name, hint in hints(type(config)).items():
    value = getattr(config, name)
    if not _fits(value, hint):
      raise UserError(f'{name} must be {name_of(hint)}, got {shown(value)}.')
    for leaf in _leaves(value):
      _check_leaf(name, leaf)


def parse(text: str, hint: Any) -> Any:
  """What `text` says, as a value of the type `hint`.

  Raises:
    ValueError: it says no such value.
  """
  options = _options(hint)
  if len(options) > 1:
    # Text last, as everything is text.
    for option in sorted(options, key=lambda option: option is str):
      try:
        return parse(text, option)
      except ValueError:
        continue
    raise ValueError(text)
  option = next(iter(options))
  if option is str:
    return text
  if option is bool:
    value = _WORDS.get(text.strip().lower())
    if value is None:
      raise ValueError(text)
    return value
  if option in (int, float):
    return option(text)
  if option is _NONE:
    if text != 'None':
      raise ValueError(text)
    return None
  if not _is_tuple(option):
    raise ValueError(text)
  value = _as_tuples(_literal(text, option))
  if not _fits(value, option):
    raise ValueError(text)
  return _with_floats(value, option)


def name_of(hint: Any) -> str:
  """The values that a type allows, in words."""
  return ' or '.join(
    _NAMES.get(option)
    or (f'a tuple {_form(option)}' if _is_tuple(option) else option.__name__)
    for option in _options(hint)
  )


def _form(hint: Any) -> str:
  """What a tuple holds, such as '((whole number, whole number), ...)'."""
  if not _is_tuple(hint):
    return _NAMES[hint].removeprefix('a ')
  items = typing.get_args(hint)
  inner = ['...' if item is ... else _form(item) for item in items]
  return f'({", ".join(inner)})'


def _is_tuple(hint: Any) -> bool:
  return typing.get_origin(hint) is tuple


def _options(hint: Any) -> tuple[Any, ...]:
  is_union = isinstance(hint, types.UnionType)
  return typing.get_args(hint) if is_union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
  return any(_fits_one(value, option) for option in _options(hint))


def _fits_one(value: Any, option: Any) -> bool:
  if _is_tuple(option):
    if not isinstance(value, tuple):
      return False
    items = typing.get_args(option)
    if items[-1] is ...:
      items = items[:1] * len(value)
    return len(items) == len(value) and all(map(_fits, value, items))
  if isinstance(value, bool):
    return option is bool
  return isinstance(value, (int, float) if option is float else option)


def _leaves(value: Any) -> Iterator[Any]:
  if isinstance(value, tuple):
    for item in value:
      yield from _leaves(item)
  else:
    yield value


def _check_leaf(name: str, value: Any) -> None:
  if isinstance(value, float):
    require(
      math.isfinite(value), f'{name} must be a finite number, got {value}.'
    )
    require(
      abs(value) <= _MOST_FLOAT,
      f'{name} must be a number of float32, up to {_MOST_FLOAT:.4g}, got '
      f'{value}.',
    )
  elif isinstance(value, int):
    require(
      abs(value) <= MOST,
      f'{name} must be at most {MOST:,}, got {shown(value)}.'
      if value > 0
      else f'{name} must be at least -{MOST:,}, got {shown(value)}.',
    )
  elif isinstance(value, str):
    require(
      '\0' not in value,
      f'{name} must not hold the NUL character, got {shown(value)}.',
    )


def _literal(text: str, option: Any) -> Any:
  """The tuple that `text` is in Python, or its words if they may be text."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')
      return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    if typing.get_args(option) == (str, ...) and not set('()[]\'"') & {*text}:
      return tuple(part.strip() for part in text.split(','))
    raise ValueError(text) from None


def _with_floats(value: Any, hint: Any) -> Any:
  """The value with floats for whole numbers where they are meant."""
  if hint is float:
    try:
      return float(value)
    except OverflowError as error:
      raise ValueError(value) from error
  if not _is_tuple(hint):
    return value
  items = typing.get_args(hint)
  if items[-1] is ...:
    items = items[:1] * len(value)
  return tuple(map(_with_floats, value, items))


def _as_tuples(value: Any) -> Any:
  if isinstance(value, list | tuple):
    return tuple(map(_as_tuples, value))
  return value
