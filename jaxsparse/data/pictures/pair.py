# SPDX-License-Identifier: Apache-2.0
"""A picture with what is said of it, and what a collection of them can do."""

import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
  """One picture, or the frames of a video, and its captions."""

  # Unique in its collection; the random split hangs on it.
  name: str
  # Where its picture is in its collection.
  number: int
  # The first is what it is found by; training draws one of them.
  captions: tuple[str, ...]
  # Of pictures that may be held out as a whole.
  group: str = ''
  # What stands before each caption and is not learned, such as a question.
  prompt: str = ''
  # Captions that look like the first one and are wrong.
  distractors: tuple[str, ...] = ()
  # Pairs of one meaning are right for each other, as are those of one picture
  # or of one first caption.
  meaning: str = ''
  # 'train' or 'validation' where the collection itself says so.
  split: str = ''
  # The same number for pairs that are right for each other.
  item: int = -1

  # Each is a document as readers of a corpus know it.
  ends_document = True

  @property
  def text(self) -> bytes:
    return '\n'.join(self.prompt + c for c in self.captions).encode()


@runtime_checkable
class Pairs(Protocol):
  """A collection of pairs."""

  pairs: Sequence[Pair]
  # Whether pictures are made faster than they are read.
  is_drawn: bool

  def digest(self, number: int) -> str:
    """What identifies a picture by its content.

    Raises:
      UserError: it can't be read.
    """

  def picture(self, number: int, size: int) -> np.ndarray:
    """The picture, uint8 [S, S, 3], or the frames [F, S, S, 3].

    Raises:
      UserError: it can't be read, or is broken.
    """


def classes(keys: Sequence[Iterable[Hashable]]) -> list[int]:
  """Numbers those alike that share a key, or are linked by others that do.

  Args:
    keys: of each thing in turn.

  Returns:
    The number of each, from 0 in the order of their first members.
  """
  parent = list(range(len(keys)))

  def root(i: int) -> int:
    while parent[i] != i:
      parent[i] = i = parent[parent[i]]
    return i

  first = {}
  for i, some in enumerate(keys):
    for key in some:
      j = root(first.setdefault(key, i))
      i_root = root(i)
      parent[max(i_root, j)] = min(i_root, j)
  numbers = {}
  return [numbers.setdefault(root(i), len(numbers)) for i in range(len(keys))]
