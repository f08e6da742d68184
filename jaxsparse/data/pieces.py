# SPDX-License-Identifier: Apache-2.0
"""Text cut into pieces, and the corpus that stores them."""

import dataclasses
import io
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

# Small enough that a piece is cheap to read for a few of its tokens, large
# enough that few tokens stand at a piece's start, where they see no context.
PIECE_BYTES = 8192


class Piece(NamedTuple):
  """A stretch of one document."""

  text: bytes
  # Whether the document ends here; only then the boundary is a target.
  ends_document: bool


class Answers(NamedTuple):
  """A chat as a model reads it, of which its answers are learned."""

  # int32 [n].
  tokens: np.ndarray
  # Which of them are targets, bool [n].
  is_learned: np.ndarray
  # Of the answers that are learned.
  text: bytes
  ends_document: bool = True


class Pieces(Sequence[Piece]):
  """Random access to one split of a TFDS data source."""

  def __init__(self, source: Any, feature: str):
    """`source` yields dicts; without 'ends_document' each is a document."""
    self._source = source
    self._feature = feature

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: Any) -> Piece:
    example = self._source[int(index)]
    text = example[self._feature]
    return Piece(
      text.encode() if isinstance(text, str) else bytes(text),
      bool(example.get('ends_document', True)),
    )

  def __iter__(self) -> Iterator[Piece]:
    return (self[i] for i in range(len(self)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """Random access to the pieces of each split."""

  # Hash of the text and its split: what a saved iterator state belongs to.
  key: str
  # Where what is computed from the corpus is kept, too.
  directory: pathlib.Path
  # Pieces, or of data.messages chats.
  train: Sequence[Any]
  validation: Sequence[Any]
  test: Sequence[Any] | None
  # Bytes of UTF-8 in the validation split, boundaries not counted; of chats
  # those of their answers.
  validation_bytes: int
  # Whether pieces are chats, of which answers alone are learned.
  has_chats: bool = False
  # A `pictures.pair.Pairs`: the pieces are pairs of it.
  pictures: Any = None
  # Text that was learned before: measured, and with data.replay mixed in.
  before: 'Corpus | None' = None


def character_start(text: bytes, offset: int) -> int:
  """The largest start of a UTF-8 character that is at most `offset`."""
  while 0 < offset < len(text) and text[offset] & 0xC0 == 0x80:
    offset -= 1
  return offset


def cut(
  stream: io.BufferedIOBase, num_bytes: int, size: int = PIECE_BYTES
) -> Iterator[tuple[bytes, bool]]:
  """Cuts the next `num_bytes` bytes of a stream of UTF-8 into pieces.

  A cut falls behind the last newline of a piece's second half, or between two
  characters where there is none.

  Args:
    stream: read from its present position.
    num_bytes: bytes to take.
    size: most bytes of one piece, at least 4.

  Yields:
    Each piece, and whether it is the last one.
  """
  text = b''
  while num_bytes or text:
    # One byte more than a piece holds shows whether a character goes on.
    block = stream.read(min(num_bytes, size + 1 - len(text)))
    num_bytes = num_bytes - len(block) if block else 0
    text += block
    if len(text) <= size and not num_bytes:
      if text:
        yield text, True
      return
    if len(text) <= size:
      continue
    newline = text.rfind(b'\n', size // 2, size)
    end = newline + 1 if newline >= 0 else character_start(text, size)
    yield text[:end], False
    text = text[end:]
