"""Text files as documents, and their split into train, validation and test."""

import codecs
import dataclasses
import glob
import gzip
import hashlib
import io
import os
import pathlib
import zlib
from collections.abc import Sequence

from jaxsparse.config import DataConfig
from jaxsparse.data import pieces
from jaxsparse.errors import UserError

_BLOCK_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
  """One text, in a file or in memory."""

  # The same wherever the file lies; the split by file hangs on it.
  name: str
  path: pathlib.Path | None = None
  content: bytes = b''

  def open(self) -> io.BufferedIOBase:
    if self.path is None:
      return io.BytesIO(self.content)
    if self.path.suffix == '.gz':
      return gzip.open(self.path, 'rb')
    return self.path.open('rb')

  def digest(self) -> str:
    """SHA-256 of the file as it is, compressed or not.

    Raises:
      UserError: the file cannot be read.
    """
    if self.path is None:
      return hashlib.sha256(self.content).hexdigest()
    try:
      with self.path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
    except OSError as error:
      raise UserError(
        f'{self.path} cannot be read ({error.strerror}): repair it, or leave '
        'it out of data.text.'
      ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
  """Bytes `start` to `stop` of a document."""

  document: Document
  start: int
  stop: int
  # Whether `stop` is the document's end.
  ends_document: bool


# Split names to spans, in the order in which they are stored.
Splits = dict[str, list[Span]]


def match(patterns: str) -> list[Document]:
  """The files that comma-separated globs name, sorted by path.

  Raises:
    UserError: a glob names no file.
  """
  found = set()
  names = [name.strip() for name in patterns.split(',')]
  for pattern in [name for name in names if name] or names[:1]:
    expanded = str(pathlib.Path(pattern).expanduser())
    # Path.glob takes no absolute pattern.
    matches = map(pathlib.Path, glob.glob(expanded, recursive=True))  # noqa: PTH207
    files = {path.absolute() for path in matches if path.is_file()}
    if not files:
      raise UserError(
        f'data.text = {pattern!r} names no file: give a glob of text files, '
        "such as 'books/*.txt'."
      )
    found |= files
  paths = sorted(found)
  shared = os.path.commonpath([path.parent for path in paths])
  return [
    Document(name=path.relative_to(shared).as_posix(), path=path)
    for path in paths
  ]


def measure(document: Document) -> int:
  """A document's bytes, all of which are read.

  Raises:
    UserError: the document cannot be read or is not UTF-8.
  """
  decoder = codecs.getincrementaldecoder('utf-8')()
  size = 0
  try:
    with document.open() as stream:
      while block := stream.read(_BLOCK_BYTES):
        pending = len(decoder.getstate()[0])
        decoder.decode(block)
        size += len(block)
    pending = len(decoder.getstate()[0])
    decoder.decode(b'', final=True)
  except UnicodeDecodeError as error:
    raise UserError(
      f'{document.path or document.name} is not UTF-8 at byte '
      f'{size - pending + error.start}: convert it, or leave it out of '
      'data.text.'
    ) from error
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(
      f'{document.path or document.name} cannot be read ({error}): repair it, '
      'or leave it out of data.text.'
    ) from error
  return size


def split(
  documents: Sequence[Document], sizes: Sequence[int], config: DataConfig
) -> Splits:
  """Gives every byte of the documents to one split.

  Raises:
    UserError: a split would be empty.
  """
  total = sum(sizes)
  if not total:
    raise UserError(
      f'data.text = {config.text!r} names only empty files: give files with '
      'text.'
    )
  by_kind = _split_files if config.split == 'file' else _split_bytes
  splits = by_kind(documents, sizes, config)
  fractions = dict(
    validation=config.validation_fraction, test=config.test_fraction
  )
  for name, spans in splits.items():
    if not spans and fractions.get(name, 1):
      raise UserError(
        f'the corpus of {total:,} bytes in {len(documents):,} files is too '
        f'small for a {name} split with data.split = {config.split!r}: give '
        "more text, a larger fraction, or data.split='bytes'."
      )
  return splits


def _split_files(
  documents: Sequence[Document], sizes: Sequence[int], config: DataConfig
) -> Splits:
  """Whole files, drawn by a hash of their names until the fraction is met."""

  def rank(i: int) -> str:
    return hashlib.sha256(documents[i].name.encode()).hexdigest()

  rest = sorted((i for i, size in enumerate(sizes) if size), key=rank)
  chosen = {}
  for name in ('validation', 'test'):
    wanted = getattr(config, f'{name}_fraction') * sum(sizes)
    chosen[name] = _draw(rest, sizes, wanted)
    rest = [i for i in rest if i not in chosen[name]]
  chosen['train'] = set(rest)
  return {
    name: [
      Span(document=documents[i], start=0, stop=sizes[i], ends_document=True)
      for i in sorted(chosen[name])
    ]
    for name in ('train', 'validation', 'test')
  }


def _draw(order: list[int], sizes: Sequence[int], wanted: float) -> set[int]:
  """Indices in `order` whose sizes sum to about `wanted`; never all of them."""
  drawn, total = set(), 0
  for i in order:
    # One huge file must not become half of the corpus.
    if total < wanted and total + sizes[i] <= 1.5 * wanted:
      drawn.add(i)
      total += sizes[i]
  if not drawn and wanted and len(order) > 1:
    drawn.add(min(order, key=lambda i: sizes[i]))
  return drawn


def _split_bytes(
  documents: Sequence[Document], sizes: Sequence[int], config: DataConfig
) -> Splits:
  """Contiguous shares of the documents' concatenation, in this order."""
  total = sum(sizes)
  num_test = round(config.test_fraction * total)
  num_validation = round(config.validation_fraction * total)
  stops = dict(
    train=total - num_test - num_validation,
    validation=total - num_test,
    test=total,
  )
  splits = {name: [] for name in stops}
  offset = 0
  for document, size in zip(documents, sizes, strict=True):
    start = 0
    for name, stop in stops.items():
      end = min(stop - offset, size)
      if end < size:
        end = _character_start(document, end) if end > start else start
      if end > start:
        splits[name].append(
          Span(
            document=document,
            start=start,
            stop=end,
            ends_document=end == size,
          )
        )
        start = end
    offset += size
  return splits


def _character_start(document: Document, offset: int) -> int:
  """`offset`, or the start of the character that it would cut."""
  lead = min(offset, 3)
  with document.open() as stream:
    stream.seek(offset - lead)
    around = stream.read(lead + 1)
  return offset - lead + pieces.character_start(around, lead)
