# SPDX-License-Identifier: Apache-2.0
"""Documents' split into train, validation and test."""

import dataclasses
import hashlib
from collections.abc import Sequence

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import pieces
from jaxsparse.data.documents import Document

# A split by file may miss the wanted share by this factor.
_MOST_OFF = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
  """Bytes `start` to `stop` of a document's text."""

  document: Document
  start: int
  stop: int

  @property
  def num_bytes(self) -> int:
    return self.stop - self.start


# Split names to spans, in the order in which they are stored.
Splits = dict[str, list[Span]]


def kind(
  documents: Sequence[Document], sizes: Sequence[int], config: DataConfig
) -> str:
  """'file' or 'bytes': what data.split stands for with these documents.

  'auto' is 'file' where whole files make up about the wanted shares.
  """
  if config.split != 'auto':
    return config.split
  splits = _split_files(documents, sizes, config)
  for name, share in _shares(config).items():
    wanted = share * sum(sizes)
    num_bytes = sum(span.num_bytes for span in splits[name])
    if not wanted / _MOST_OFF <= num_bytes <= _MOST_OFF * wanted:
      return 'bytes'
  return 'file'


def _shares(config: DataConfig) -> dict[str, float]:
  held_out = dict(
    validation=config.validation_fraction, test=config.test_fraction
  )
  return dict(train=1 - sum(held_out.values()), **held_out)


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
  by_file = kind(documents, sizes, config) == 'file'
  splits = (_split_files if by_file else _split_bytes)(documents, sizes, config)
  for name, share in _shares(config).items():
    if splits[name] or not share:
      continue
    if by_file:
      raise UserError(
        f"data.split = 'file' leaves no file for {name} (files with text: "
        f"{sum(map(bool, sizes)):,}): give more files, or data.split='bytes'."
      )
    raise UserError(
      f'the corpus of {total:,} bytes is too small for a {name} split: give '
      f'more text, or other shares than data.validation_fraction = '
      f'{config.validation_fraction} and data.test_fraction = '
      f'{config.test_fraction}.'
    )
  return splits


def _split_files(
  documents: Sequence[Document], sizes: Sequence[int], config: DataConfig
) -> Splits:
  """Whole files, drawn by a hash of their names until the fraction is met."""

  def rank(i: int) -> str:
    name = documents[i].name.encode(errors='surrogateescape')
    return hashlib.sha256(name).hexdigest()

  rest = sorted((i for i, size in enumerate(sizes) if size), key=rank)
  chosen = {}
  for name in ('validation', 'test'):
    wanted = _shares(config)[name] * sum(sizes)
    chosen[name] = _draw(rest, sizes, wanted)
    rest = [i for i in rest if i not in chosen[name]]
  chosen['train'] = set(rest)
  return {
    name: [
      Span(document=documents[i], start=0, stop=sizes[i])
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
        splits[name].append(Span(document=document, start=start, stop=end))
        start = end
    offset += size
  return splits


def _character_start(document: Document, offset: int) -> int:
  """`offset`, or the start of the character that it would cut."""
  lead = min(offset, 3)
  around = b''.join(
    piece for piece, _ in document.read(offset - lead, offset + 1)
  )
  return offset - lead + pieces.character_start(around, lead)
