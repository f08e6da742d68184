# SPDX-License-Identifier: Apache-2.0
"""Text files as documents: what they are known by, their size, their pieces."""

import codecs
import contextlib
import dataclasses
import hashlib
import io
import lzma
import pathlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from jaxsparse.config.errors import UserError
from jaxsparse.data import formats, pieces, records, text_files

_BLOCK_BYTES = 1 << 20
# Text without a mark that holds so many NUL bytes is UTF-16, or none.
_MOST_NUL_BYTES = 0.1

_READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)

# Gets the position in the raw file that reading has reached.
Position = Callable[[int], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """A text in a file or in memory, or a file of many, each in a record."""

  # The same wherever the file lies; the split by file hangs on it.
  name: str
  path: pathlib.PurePath | None = None
  content: bytes = b''
  # The field of each record that holds its text; none for plain text.
  text_field: str = ''

  def open(self) -> Any:
    """The file as it is, compressed or not, to be read in binary."""
    if self.path is None:
      return io.BytesIO(self.content)
    return self.path.open('rb')

  def num_file_bytes(self) -> int:
    if self.path is None:
      return len(self.content)
    with _readable(self):
      stat = self.path.stat()
      return stat.st_size if self.is_local else stat.length

  @property
  def is_local(self) -> bool:
    return self.path is None or isinstance(self.path, pathlib.Path)

  def digest(self, position: Position = lambda _: None) -> str:
    """SHA-256 of the file as it is, compressed or not.

    Raises:
      UserError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with _readable(self), self.open() as raw:
      while block := raw.read(_BLOCK_BYTES):
        digest.update(block)
        position(raw.tell())
    return digest.hexdigest()

  def read(self, start: int, stop: int) -> Iterator[tuple[bytes, bool]]:
    """Cuts bytes `start` to `stop` of the text into pieces.

    The texts of records follow each other without a gap.

    Yields:
      Each piece, and whether a text ends with it.

    Raises:
      UserError: the file cannot be read.
    """
    with _readable(self), self.open() as raw:
      if not self.text_field:
        text = formats.open_text(raw, self._path)
        formats.skip(text, start)
        for piece, is_last in pieces.cut(text, stop - start):
          yield piece, is_last and not text.read(1)
        return
      offset = 0
      for text in records.read(raw, self._path, self.text_field):
        part = text[max(start - offset, 0) : max(stop - offset, 0)]
        offset += len(text)
        for piece, is_last in pieces.cut(io.BytesIO(part), len(part)):
          yield piece, is_last and offset <= stop
        if offset >= stop:
          return

  def measure(self, position: Position = lambda _: None) -> int:
    """Bytes of the text, all of which is read.

    Raises:
      UserError: the document cannot be read, is not UTF-8, or has a record
        that is broken or without text.
    """
    with _readable(self), self.open() as raw:
      if not self.text_field:
        return self._measure_plain(raw, position)
      size = 0
      for text in records.read(raw, self._path, self.text_field):
        size += len(text)
        position(raw.tell())
    return size

  def looks_like_json(self) -> bool:
    """Whether it is plain text to us and seems to be made for a parser."""
    if self.text_field:
      return False
    return formats.ending(self._path) == '.json' or bool(
      records.json_object(self.first_line())
    )

  def first_line(self) -> bytes:
    with _readable(self), self.open() as raw:
      return formats.open_text(raw, self._path).readline(_BLOCK_BYTES)

  @property
  def _path(self) -> pathlib.PurePath:
    return self.path or pathlib.PurePath(self.name)

  def _measure_plain(self, raw: io.IOBase, position: Position) -> int:
    decoder = codecs.getincrementaldecoder('utf-8')()
    text = formats.open_text(raw, self._path)
    size = 0
    try:
      while block := text.read(_BLOCK_BYTES):
        pending = len(decoder.getstate()[0])
        decoder.decode(block)
        self._require_text(block)
        size += len(block)
        position(raw.tell())
      pending = len(decoder.getstate()[0])
      decoder.decode(b'', final=True)
    except UnicodeDecodeError as error:
      raise UserError(
        f'{str(self._path)!r} is not UTF-8 at byte '
        f'{size - pending + error.start}: convert it, or leave it out of '
        'data.text.'
      ) from error
    return size

  def _require_text(self, block: bytes) -> None:
    if block.count(0) > _MOST_NUL_BYTES * len(block):
      raise UserError(
        f'{str(self._path)!r} holds more NUL bytes than text does, as UTF-16 '
        'and archives do: convert or unpack it, or leave it out of data.text.'
      )


def match(patterns: str, text_field: str = 'text') -> list[Document]:
  """The files that data.text names, in the order of their paths.

  Raises:
    UserError: a pattern names no file, or a file cannot be read.
  """
  paths = text_files.find(patterns)
  names = text_files.names_below_shared_folder(paths)
  return [
    _with_records(Document(name=name, path=path), text_field)
    for name, path in zip(names, paths, strict=True)
  ]


def _with_records(document: Document, text_field: str) -> Document:
  """The document, as a file of records if it is one."""
  ending = formats.ending(document.path)
  # JSON lines are often called so, and so are files of a single object.
  holds_records = ending in records.ENDINGS or (
    ending == '.json'
    and text_field in records.json_object(document.first_line())
  )
  if not holds_records:
    return document
  return dataclasses.replace(document, text_field=text_field)


@contextlib.contextmanager
def _readable(document: Document) -> Iterator[None]:
  """Says in a sentence why a document cannot be read."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    # The libraries of remote stores have errors of their own.
    if document.is_local and not isinstance(error, _READ_ERRORS):
      raise
    reason = getattr(error, 'strerror', None) or error or type(error).__name__
    raise UserError(
      f'{str(document.path or document.name)!r} cannot be read ({reason}): '
      'repair it, or leave it out of data.text.'
    ) from error
