# SPDX-License-Identifier: Apache-2.0
"""Pairs in tar files, as webdataset has them: KEY.png beside KEY.txt or .json.

Files are read where they lie, by their offsets; nothing is unpacked.
"""

import hashlib
import json
import pathlib
import tarfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxsparse.config.errors import UserError
from jaxsparse.data.pictures import captions, decode
from jaxsparse.data.pictures.pair import Pair

_PICTURES = ('png', 'jpg', 'jpeg', 'webp', 'gif', 'bmp', 'tif', 'tiff')
# A caption is no book.
_MOST_BYTES = 1 << 20


class _Member(NamedTuple):
  """Where a file lies."""

  archive: Any
  name: str
  start: int
  size: int

  def read(self) -> bytes:
    try:
      with self.archive.open('rb') as file:
        file.seek(self.start)
        content = file.read(self.size)
    except OSError as error:
      raise UserError(
        f'{str(self.archive)!r} cannot be read ({error.strerror or error}): '
        'bring it back.'
      ) from error
    if len(content) < self.size:
      raise _broken(self.archive, 'it ends too early')
    return content

  def __str__(self) -> str:
    return f'{self.name} in {self.archive}'


class Tar:
  """The pairs of tar files."""

  is_drawn = False

  def __init__(
    self,
    paths: Sequence[pathlib.PurePath],
    say: Callable[[str], None] = print,
  ):
    """Reads names and captions.

    Args:
      paths: of the files.
      say: gets a line on pictures that are no pair's.

    Raises:
      UserError: a file is no whole tar file, or has a picture without a
        caption, a caption without a picture, or a key twice.
    """
    self.pairs: list[Pair] = []
    self._pictures: list[_Member] = []
    archive_of = {}
    for path in paths:
      for key, parts in _samples(path, say).items():
        where = f'{key!r} in {str(path)!r}'
        if key in archive_of:
          raise UserError(
            f'{where} is in {str(archive_of[key])!r} too: give each pair a key '
            'of its own.'
          )
        archive_of[key] = path
        picture = parts.get('picture')
        # Beside a .txt, .json holds what else is known.
        said = parts.get('txt') or parts.get('json')
        if picture is None or said is None:
          missing = 'picture' if picture is None else 'caption (.txt or .json)'
          raise UserError(
            f'{where} has no {missing}: add it, or leave out what there is.'
          )
        fields = _fields(said)
        self.pairs.append(Pair(name=key, number=len(self.pairs), **fields))
        self._pictures.append(picture)
    captions.require_pairs(self.pairs, ','.join(map(str, paths)))

  def digest(self, number: int) -> str:
    return hashlib.sha256(self._pictures[number].read()).hexdigest()

  def picture(self, number: int, size: int) -> np.ndarray:
    member = self._pictures[number]
    return decode.read_picture(member.read(), size, str(member))


def _samples(
  path: Any, say: Callable[[str], None]
) -> dict[str, dict[str, _Member]]:
  """Picture and caption of each key, in the order of the file."""
  found, left_out = {}, []
  try:
    with path.open('rb') as file, tarfile.open(fileobj=file, mode='r:') as tar:
      for entry in tar:
        if not entry.isreg() or entry.sparse:
          continue
        folder, _, base = entry.name.rpartition('/')
        stem, _, ending = base.partition('.')
        # Such as those that another system puts beside each file.
        if not stem or not ending:
          continue
        kind = _kind(ending.lower())
        key = f'{folder}/{stem}' if folder else stem
        if kind is None:
          if _kind(ending.lower().rpartition('.')[2]) == 'picture':
            left_out.append((key, entry.name))
          continue
        parts = found.setdefault(key, {})
        if kind in parts:
          raise UserError(
            f'{key!r} in {str(path)!r} has two files of one kind, '
            f'{parts[kind].name!r} and {entry.name!r}: leave one out.'
          )
        parts[kind] = _Member(path, entry.name, entry.offset_data, entry.size)
      _require_end(file, tar.offset, path)
  except tarfile.TarError as error:
    raise _broken(path, str(error).splitlines()[0]) from error
  except OSError as error:
    raise UserError(
      f'{str(path)!r} cannot be read ({error.strerror or error}).'
    ) from error
  # A pair may have other pictures besides, such as masks.
  left_out = [name for key, name in left_out if key not in found]
  if left_out:
    say(
      f'Pictures of {str(path)!r} that are left out: {len(left_out):,}, such '
      f'as {left_out[0]!r}, as a key ends at the first dot of its name.'
    )
  return found


def _require_end(file: Any, offset: int, path: Any) -> None:
  """Refuses a file that was cut off, or that has more behind its end.

  Where its next entry is broken `tarfile` stops as where there is none.

  Args:
    file: the tar file.
    offset: where its entries end.
    path: for errors.
  """
  file.seek(offset)
  rest = file.read(_MOST_BYTES)
  if len(rest) < tarfile.BLOCKSIZE:
    raise _broken(path, f'it ends too early, at byte {offset + len(rest):,}')
  if any(rest):
    raise _broken(path, f'what is no file begins at byte {offset:,}')


def _kind(ending: str) -> str | None:
  if ending in _PICTURES:
    return 'picture'
  return ending if ending in ('txt', 'json') else None


def _fields(member: _Member) -> dict[str, Any]:
  """What a caption's file says of its picture."""
  name = f'{member.name!r} in {str(member.archive)!r}'
  if member.size > _MOST_BYTES:
    raise UserError(
      f'{name} has {member.size:,} bytes, no caption: give one of at most '
      f'{_MOST_BYTES:,}.'
    )
  try:
    text = member.read().decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise UserError(f'{name} is not UTF-8: convert it.') from error
  if not member.name.lower().endswith('.json'):
    return dict(captions=(captions.checked(text, name),))
  try:
    record = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise UserError(
      f'{name} is no JSON ({str(error).splitlines()[0]}): repair it.'
    ) from error
  return captions.fields_of(record, name)


def _broken(path: Any, reason: str) -> UserError:
  return UserError(
    f'{str(path)!r} is no whole tar file ({reason}): give whole, plain .tar '
    'files; compressed ones have no places to read from.'
  )
