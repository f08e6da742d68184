# SPDX-License-Identifier: Apache-2.0
"""Text as it lies in files: compressed or not, with or without a mark."""

import bz2
import codecs
import gzip
import io
import lzma
import pathlib
from typing import Any

from jaxsparse.config.errors import UserError

# Longer marks first: one begins like another.
_OTHER_ENCODINGS = (
  (codecs.BOM_UTF32_LE, 'UTF-32'),
  (codecs.BOM_UTF32_BE, 'UTF-32'),
  (codecs.BOM_UTF16_LE, 'UTF-16'),
  (codecs.BOM_UTF16_BE, 'UTF-16'),
)


def ending(path: pathlib.PurePath) -> str:
  """The ending that names the format, such as '.jsonl' of 'a.jsonl.gz'."""
  suffixes = [suffix.lower() for suffix in path.suffixes]
  if suffixes and suffixes[-1] in _DECOMPRESSORS:
    suffixes.pop()
  return suffixes[-1] if suffixes else ''


def open_text(raw: io.IOBase, path: pathlib.PurePath) -> io.BufferedReader:
  """The text of a file, decompressed as its name says, behind its BOM.

  Args:
    raw: the file as it is, at its beginning.
    path: its ending names the compression.

  Raises:
    UserError: the text is marked as another encoding than UTF-8.
  """
  decompress = _DECOMPRESSORS.get(path.suffix.lower())
  text = io.BufferedReader(decompress(raw) if decompress else raw)
  head = text.peek(4)
  for mark, encoding in _OTHER_ENCODINGS:
    if head.startswith(mark):
      raise UserError(
        f'{str(path)!r} is {encoding}, not UTF-8: convert it (iconv -f '
        f'{encoding} -t UTF-8), or leave it out of data.text.'
      )
  if head.startswith(codecs.BOM_UTF8):
    text.read(len(codecs.BOM_UTF8))
  return text


def skip(text: io.BufferedReader, num_bytes: int) -> None:
  """Reads on by `num_bytes`, also where a stream knows no way back."""
  if text.seekable():
    text.seek(num_bytes, io.SEEK_CUR)
    return
  while num_bytes and (block := text.read(min(num_bytes, 1 << 20))):
    num_bytes -= len(block)


def _unpack_zstandard(raw: io.IOBase) -> Any:
  # It takes half a second to import.
  import pyarrow

  return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, 'r'), 'zstd')


_DECOMPRESSORS = {
  '.gz': gzip.open,
  '.bz2': bz2.open,
  '.xz': lzma.open,
  '.zst': _unpack_zstandard,
}
