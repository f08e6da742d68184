"""Python files that make a config or a suite, named by their path or name."""

import contextlib
import pathlib
import runpy
from typing import TypeVar

from jaxsparse.config.errors import UserError, did_you_mean, require, shown

T = TypeVar('T')

_PACKAGE = pathlib.Path(__file__).parents[1]


def _shipped(folder: str) -> pathlib.Path:
  """Where the files are that come with jaxsparse: installed, or a checkout."""
  installed = _PACKAGE / 'recipes'
  if installed.is_dir():
    return installed / folder.removeprefix('configs').lstrip('/')
  return _PACKAGE.parent / folder


def names(folder: str) -> list[str]:
  """The files of a folder such as 'configs', without their endings."""
  folders = (pathlib.Path(folder), _shipped(folder))
  return sorted({path.stem for one in folders for path in one.glob('*.py')})


def load(flag: str, path: str, folder: str, function: str, cls: type[T]) -> T:
  """What a file makes.

  Args:
    flag: that named the file, for errors.
    path: of the file, or its name in `folder`, without an ending.
    folder: such as 'configs', here or beside the package.
    function: of the file, without arguments.
    cls: of what the function returns.

  Raises:
    UserError: there is no such file, or it makes nothing of the kind.
  """
  file = _find(flag, path, folder)
  try:
    made = runpy.run_path(str(file))[function]()
  except UserError as error:
    raise UserError(f'{file}: {error}') from error
  except Exception as error:
    raise UserError(
      f'{flag}={path} could not be read ({_first_line(error)}): give a Python '
      f'file whose {function}() returns a jaxsparse {cls.__name__}.'
    ) from error
  if not isinstance(made, cls):
    raise UserError(
      f'{function}() in {path} must return a {cls.__module__}.{cls.__name__}, '
      f'got {type(made).__name__}.'
    )
  return made


def _find(flag: str, path: str, folder: str) -> pathlib.Path:
  require(
    '\0' not in path,
    f'{flag} must not hold the NUL character, got {shown(path)}.',
  )
  candidates = [path, f'{folder}/{path}.py', _shipped(folder) / f'{path}.py']
  # Where the system refuses a name, such as one that is too long.
  with contextlib.suppress(OSError, RuntimeError):
    for candidate in candidates:
      file = pathlib.Path(candidate).expanduser()
      if file.is_file():
        return file
  name = pathlib.Path(path).name.removesuffix('.py')
  shown_path = path if path.isprintable() else shown(path)
  raise UserError(
    f'{flag}={shown_path} is no file{did_you_mean(name, names(folder))}: name '
    f'one of {folder}/, such as {folder}/{_EXAMPLES[folder]}.py.'
  )


_EXAMPLES = {'configs': 'ultramem_tiny', 'configs/compare': 'facts'}


def _first_line(error: Exception) -> str:
  text = f'{type(error).__name__}: {error}'
  return text.splitlines()[0]
