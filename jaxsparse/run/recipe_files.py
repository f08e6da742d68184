# SPDX-License-Identifier: Apache-2.0
"""Python files that make a config or a suite, named by their path or name.

A recipe may have sizes. It then has a dictionary `SIZES`, of which its
`get_config` takes a key, and is named with one, as in `ultramem:680m` or
`configs/ultramem.py:680m`.
"""

import ast
import contextlib
import pathlib
import runpy
from collections.abc import Iterator
from typing import Any, TypeVar

from jaxsparse.config.errors import UserError, did_you_mean, require, shown

T = TypeVar('T')

_PACKAGE = pathlib.Path(__file__).parents[1]


def names(folder: str) -> list[str]:
  """The files of a folder such as 'configs', by their names, with each size."""
  folders = (pathlib.Path(folder), _shipped(folder))
  found = (name for one in folders for name in _names_in(one))
  return list(dict.fromkeys(found))


def load(flag: str, name: str, folder: str, function: str, cls: type[T]) -> T:
  """What a file makes.

  Args:
    flag: that named the file, for errors.
    name: path of the file, or its name in `folder`, without an ending; after a
      colon the size, which may be left out where there is only one.
    folder: such as 'configs', here or among what comes with jaxsparse.
    function: of the file; it takes the size, if the file has any.
    cls: of what the function returns.

  Raises:
    UserError: there is no such file or size, or it makes nothing of the kind.
  """
  file, size = _find(flag, name, folder)
  try:
    made = _make(file, size, function)
  except UserError as error:
    raise UserError(f'{file}: {error}') from error
  except Exception as error:
    raise UserError(
      f'{flag}={name} could not be read ({_first_line(error)}): give a Python '
      f'file whose {function}() returns a jaxsparse {cls.__name__}.'
    ) from error
  if not isinstance(made, cls):
    raise UserError(
      f'{function}() in {name} must return a {cls.__module__}.{cls.__name__}, '
      f'got {type(made).__name__}.'
    )
  return made


def shipped(
  name: str, folder: str = 'configs', function: str = 'get_config'
) -> Any:
  """What a file makes that comes with jaxsparse, whatever else has its name.

  Raises:
    UserError: the file has no such size.
  """
  stem, _, size = name.partition(':')
  return _make(_shipped(folder) / f'{stem}.py', size, function)


def _shipped(folder: str) -> pathlib.Path:
  """Where an installation has a folder's files, or the repository."""
  installed = _PACKAGE / 'recipes'
  root = installed if installed.is_dir() else _PACKAGE.parent / 'configs'
  return root / pathlib.Path(folder).relative_to('configs')


def _names_in(folder: pathlib.Path) -> Iterator[str]:
  for file in sorted(folder.glob('[!_]*.py')):
    found = sizes(file)
    yield from (f'{file.stem}:{size}' for size in found)
    if not found:
      yield file.stem


def sizes(file: pathlib.Path) -> list[str]:
  """Those of a recipe, read without running what may be anybody's file."""
  try:
    statements = ast.parse(file.read_bytes()).body
  except (OSError, SyntaxError, ValueError):
    return []
  for statement in statements:
    match statement:
      case ast.Assign(targets=[ast.Name('SIZES')], value=ast.Dict(keys=keys)):
        return [key.value for key in keys if isinstance(key, ast.Constant)]
  return []


def _make(file: pathlib.Path, size: str, function: str) -> Any:
  module = runpy.run_path(str(file))
  known = list(module.get('SIZES', ()))
  if not known:
    require(not size, f'there are no sizes, got {shown(size)}: leave it out.')
    return module[function]()
  if not size and len(known) == 1:
    (size,) = known
  require(
    size in known,
    f'size must be one of {", ".join(known)}, as in {file.stem}:{known[0]}; '
    f'got {shown(size) if size else "none"}.',
  )
  return module[function](size)


def _find(flag: str, name: str, folder: str) -> tuple[pathlib.Path, str]:
  """The file that is meant, and the size if one is named."""
  require(
    '\0' not in name,
    f'{flag} must not hold the NUL character, got {shown(name)}.',
  )
  before, _, last = name.rpartition(':')
  for path, size in ((name, ''), (before, last)):
    named = f'{path}.py'
    for candidate in (path, f'{folder}/{named}', _shipped(folder) / named):
      # Where the system refuses a name, such as one that is too long.
      with contextlib.suppress(OSError, RuntimeError):
        file = pathlib.Path(candidate).expanduser()
        if file.is_file():
          return file, size
  raise _no_file(flag, name, folder)


def _no_file(flag: str, name: str, folder: str) -> UserError:
  shown_name = name if name.isprintable() else shown(name)
  path, colon, size = name.partition(':')
  stem = pathlib.Path(path).name.removesuffix('.py') + colon + size
  known = names(folder)
  for other in known:
    # As recipes were called when each size had a file.
    if ':' in other and stem == other.replace(':', '_'):
      return UserError(f'{flag}={shown_name} is {flag}={other} now.')
  return UserError(
    f'{flag}={shown_name} is no file{did_you_mean(stem, known)}: name one of '
    f'{folder}/, such as {_EXAMPLES[folder]}.'
  )


_EXAMPLES = {'configs': 'ultramem:tiny', 'configs/compare': 'facts'}


def _first_line(error: Exception) -> str:
  text = f'{type(error).__name__}: {error}'
  return text.splitlines()[0]
