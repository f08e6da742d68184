# SPDX-License-Identifier: Apache-2.0
"""The embedded corpus: text that every Python installation carries."""

import os
import pathlib
import sysconfig
from collections.abc import Iterator

from jaxsparse.config.errors import UserError
from jaxsparse.data.documents import Document

_LEFT_OUT = frozenset(
  (
    # Tests repeat each other and hold much that is not meant to be read.
    'test', 'tests', 'idle_test',
    # Not the standard library's own.
    'site-packages', 'dist-packages', '_vendor', '_bundled',
    '__pycache__', 'lib-dynload',
  )
)  # fmt: skip


def documents() -> list[Document]:
  """The standard library's sources and the language reference, by name.

  Raises:
    UserError: the installation carries no sources.
  """
  root = pathlib.Path(sysconfig.get_path('stdlib'))
  found = _references()
  for path in _sources(root):
    if text := _read(path):
      name = path.relative_to(root).as_posix()
      found.append(Document(name=name, content=text))
  if not found:
    raise UserError(
      f'this Python carries no sources below {str(root)!r}: give data.text, '
      "a glob of your own text files, such as 'books/*.txt'."
    )
  return sorted(found, key=lambda document: document.name)


def _sources(root: pathlib.Path) -> Iterator[pathlib.Path]:
  for folder, folders, files in os.walk(root):
    folders[:] = [
      name
      for name in folders
      # config-3.11-x86_64-linux-gnu and the like hold build settings.
      if name not in _LEFT_OUT and not name.startswith('config-')
    ]
    for name in files:
      path = pathlib.Path(folder, name)
      # Build settings again; and the reference as one table of strings, which
      # `_references` takes apart.
      is_data = name.startswith('_sysconfigdata') or (
        path == root / 'pydoc_data' / 'topics.py'
      )
      if path.suffix == '.py' and not is_data:
        yield path


def _references() -> list[Document]:
  try:
    from pydoc_data import topics
  except ImportError:
    return []
  return [
    Document(name=f'pydoc_data/{name}.txt', content=text.encode())
    for name, text in topics.topics.items()
  ]


def _read(path: pathlib.Path) -> bytes:
  """The file's bytes; none where it cannot be read or is not UTF-8."""
  try:
    text = path.read_bytes()
    text.decode()
  except (OSError, UnicodeDecodeError):
    return b''
  return text
