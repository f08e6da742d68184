# SPDX-License-Identifier: Apache-2.0
"""The files that data.text names: paths, folders and globs, local or remote."""

import contextlib
import glob
import pathlib
from collections.abc import Callable, Iterator

from etils import epath

from jaxsparse.config.errors import UserError


def find(patterns: str) -> list[pathlib.PurePath]:
  """The files that comma-separated paths, folders and globs name, in order.

  A path that exists is meant as it is, whatever commas and brackets are in it.
  A folder means all files below it but hidden ones.

  Returns:
    Absolute paths: `pathlib.Path` on this machine, `epath.Path` elsewhere.

  Raises:
    UserError: one of them names no file, or its place cannot be reached.
  """
  if '://' not in patterns and _holds(_expanded(patterns).exists):
    names = [patterns]
  else:
    names = patterns.split(',')
  found = set()
  while names:
    files, used = _first(names)
    found |= files
    names = names[used:]
  if not found:
    raise _names_no_file(patterns)
  return sorted(found, key=lambda path: path.parts)


def names_below_shared_folder(paths: list[pathlib.PurePath]) -> list[str]:
  """Names that are the same wherever the files lie, 'b/c.txt' for one."""
  folders = [path.parent.parts for path in paths]
  shared = 0
  for parts in zip(*folders, strict=False):
    if len(set(parts)) > 1:
      break
    shared += 1
  return ['/'.join(path.parts[shared:]) for path in paths]


def _first(names: list[str]) -> tuple[set[pathlib.PurePath], int]:
  """The files of the first name, and how many of `names` it is made of."""
  if not names[0].strip():
    return set(), 1
  for used in range(1, len(names) + 1):
    # A comma may belong to the name.
    name = ','.join(names[:used]).strip()
    find_files = _remote_files if '://' in name else _local_files
    if files := set(find_files(name)):
      return files, used
  raise _names_no_file(names[0].strip())


def _names_no_file(name: str) -> UserError:
  return UserError(
    f'data.text = {name!r} names no file: give text files, a folder or a glob, '
    "such as 'books/*.txt'."
  )


def _local_files(name: str) -> list[pathlib.Path]:
  matches = _glob(_taken_literally(_expanded(name)))
  files = [path for path in matches if _holds(path.is_file)] or [
    path
    for folder in matches
    for path in _glob(glob.escape(str(folder)) + '/**')
    if _holds(path.is_file)
  ]
  return [path.absolute() for path in files]


def _glob(pattern: str) -> list[pathlib.Path]:
  # Path.glob takes no absolute pattern.
  return [pathlib.Path(path) for path in glob.glob(pattern, recursive=True)]  # noqa: PTH207


def _taken_literally(path: pathlib.Path) -> str:
  """A glob in which the longest part that exists has no special characters."""
  for part in (path, *path.parents):
    if _holds(part.exists):
      rest = path.relative_to(part)
      return str(pathlib.Path(glob.escape(str(part))) / rest)
  return str(path)


def _expanded(name: str) -> pathlib.Path:
  try:
    return pathlib.Path(name).expanduser()
  except RuntimeError:
    # There is no such user.
    return pathlib.Path(name)


def _holds(condition: Callable[[], bool]) -> bool:
  """Whether it holds of a path; False where the system does not know."""
  try:
    return condition()
  except OSError:
    return False


def remote_path(name: str) -> epath.Path:
  """A place elsewhere, as 'gs://bucket/folder'.

  Raises:
    ValueError: nothing is known of its scheme.
  """
  try:
    return epath.Path(name)
  except KeyError:
    scheme = name.partition('://')[0]
    raise ValueError(f'no scheme {scheme}:// is known') from None


@contextlib.contextmanager
def reaching(name: str) -> Iterator[None]:
  """Says in a sentence why a place elsewhere cannot be reached."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(
      f'data.text = {name!r} cannot be reached ({reason}): see to access and '
      'to the library of its scheme, such as gcsfs for gs://, or copy it to '
      'this machine.'
    ) from error


def _remote_files(name: str) -> list[epath.Path]:
  with reaching(name):
    return list(_matches_of(name))


def _matches_of(name: str) -> Iterator[epath.Path]:
  path = remote_path(name)
  if path.is_dir():
    yield from _files_below(path)
  elif path.exists():
    yield path
  elif glob.has_magic(name):
    # The first two parts stand for the scheme.
    parts = path.parts[2:]
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    scheme = name.partition('://')[0]
    root = epath.Path(f'{scheme}://{"/".join(parts[:fixed])}')
    for match in root.glob('/'.join(parts[fixed:])):
      if not match.is_dir():
        yield match


def _files_below(folder: epath.Path) -> Iterator[epath.Path]:
  for path in folder.iterdir():
    # Some stores list a folder among what is in it.
    if path.name.startswith('.') or path == folder:
      continue
    if path.is_dir():
      yield from _files_below(path)
    else:
      yield path
