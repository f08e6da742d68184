# SPDX-License-Identifier: Apache-2.0
"""The undo journal of a row store: what rows held when a step was sealed.

Before a row is first overwritten after a step was sealed, its bytes are added
here, and the disk has them. Whoever opens the store at that step puts them
back. So a save costs what was touched since the last one, not the table.

A journal is a sequence of records, each of one write: four bytes that mark its
beginning, a checksum, its length, and what it holds. A record that a kill or a
power cut has left incomplete is the last one, and the write that it belongs to
has not begun.
"""

import dataclasses
import json
import math
import os
import pathlib
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxsparse.config.errors import UserError

_HEADER = struct.Struct('<4sIQ')
_MARK = b'undo'


@dataclasses.dataclass(frozen=True)
class Before:
  """Rows of some leaves as they were.

  Attributes:
    ids: their numbers, int64 [n].
    rows: bytes of each row by the name of its leaf, uint8 [n, S].
  """

  ids: np.ndarray
  rows: Mapping[str, np.ndarray]


def as_bytes(rows: np.ndarray) -> np.ndarray:
  """Rows as a journal has them, uint8 [n, S]."""
  shape = len(rows), rows.dtype.itemsize * math.prod(rows.shape[1:])
  return np.ascontiguousarray(rows).view(np.uint8).reshape(shape)


class Journal:
  """A journal that is written to."""

  def __init__(self, path: pathlib.Path):
    """Begins it anew, empty."""
    self.path = path
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    self._file = os.open(path, flags, 0o666)
    os.fsync(self._file)

  def append(self, entries: Sequence[Before]) -> None:
    """Returns when the disk has them.

    Raises:
      OSError: it can't be written.
    """
    heads = [
      dict(
        num_rows=len(e.ids),
        row_bytes={name: rows.shape[1] for name, rows in e.rows.items()},
      )
      for e in entries
    ]
    head = json.dumps(heads).encode()
    parts = [struct.pack('<Q', len(head)), head]
    for entry in entries:
      parts.append(entry.ids.astype('<i8').tobytes())
      parts += [np.ascontiguousarray(r).tobytes() for r in entry.rows.values()]
    payload = b''.join(parts)
    header = _HEADER.pack(_MARK, zlib.crc32(payload), len(payload))
    _write_all(self._file, header + payload)
    os.fdatasync(self._file)

  def close(self) -> None:
    if self._file >= 0:
      os.close(self._file)
      self._file = -1


def _write_all(descriptor: int, content: bytes) -> None:
  left = memoryview(content)
  while left:
    left = left[os.write(descriptor, left) :]


def read(path: pathlib.Path) -> Iterator[Before]:
  """What a journal holds, a write at a time.

  Raises:
    UserError: one of its records is damaged.
  """
  with path.open('rb') as file:
    size = os.fstat(file.fileno()).st_size
    while True:
      header = file.read(_HEADER.size)
      if len(header) < _HEADER.size:
        return
      mark, checksum, length = _HEADER.unpack(header)
      end = file.tell() + length
      if mark != _MARK or end > size:
        _require_last(path, header, file.read())
        return
      payload = file.read(length)
      if zlib.crc32(payload) != checksum:
        if end < size:
          raise UserError(_damage(path))
        return
      yield from _unpacked(payload)


def _require_last(path: pathlib.Path, header: bytes, rest: bytes) -> None:
  """Of a power cut, what is no record is the end."""
  if _MARK in header[1:] + rest:
    raise UserError(_damage(path))


def _damage(path: pathlib.Path) -> str:
  return (
    f'{str(path)!r} is damaged, which tells how rows of tables were at the '
    'last checkpoint: copy the workdir from where it is whole.'
  )


def _unpacked(payload: bytes) -> Iterator[Before]:
  (length,) = struct.unpack_from('<Q', payload)
  place = 8 + length
  for head in json.loads(payload[8:place]):
    num_rows = head['num_rows']
    ids = np.frombuffer(payload, '<i8', num_rows, place)
    place += ids.nbytes
    rows = {}
    for name, row_bytes in head['row_bytes'].items():
      of = np.frombuffer(payload, np.uint8, num_rows * row_bytes, place)
      place += of.nbytes
      rows[name] = of.reshape(num_rows, row_bytes)
    yield Before(ids, rows)
