# SPDX-License-Identifier: Apache-2.0
"""What has been read of a prompt, kept for later prompts that begin alike.

A snapshot is the state of a slot after whole chunks, whatever its caches are: a
job that takes it over goes on as if it had read the chunks, bit for bit. They
are found by a chain of hashes, one for each chunk.
"""

import collections
import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

# Beginnings of prompts that are known by their hash, with or without snapshot.
_MOST_KNOWN = 1 << 14


class Part(Protocol):
  """Arrays of a state, and how large they are together."""

  num_bytes: int


class Snapshot(Protocol):
  """The state of a slot after `length` tokens, in parts that others share."""

  length: int
  parts: Sequence[Part]


class PrefixStore:
  """Snapshots by the tokens that were read, those used last, bounded in bytes.

  Args:
    chunk: tokens of a chunk.
    max_bytes: of all snapshots together; 0 keeps none.
    root: what else the state depends on, such as the checkpoint's step.
  """

  def __init__(self, chunk: int, max_bytes: int, root: str = ''):
    self._chunk, self._max_bytes, self._root = chunk, max_bytes, root
    # By hash: the tokens, and the state after them.
    self._kept: collections.OrderedDict[bytes, tuple[bytes, Snapshot]] = (
      collections.OrderedDict()
    )
    # By id: parts of those that are kept, and in how many each is.
    self._parts: dict[int, Part] = {}
    self._uses: collections.Counter[int] = collections.Counter()
    self._known: collections.OrderedDict[bytes, None] = (
      collections.OrderedDict()
    )
    self.num_bytes = 0

  def __len__(self) -> int:
    return len(self._kept)

  def find(self, tokens: Sequence[int], salt: str) -> Snapshot | None:
    """The longest state that a prompt can begin with; a token is left to read.

    Only jobs of the same salt share states.
    """
    if not self._max_bytes:
      return None
    hashes = self._hashes(tokens, salt)
    for count, key in reversed(list(enumerate(hashes, 1))):
      if key in self._kept:
        read, snapshot = self._kept[key]
        if read == _bytes(tokens[: count * self._chunk]):
          self._kept.move_to_end(key)
          return snapshot
    return None

  def worth_keeping(self, tokens: Sequence[int], salt: str) -> frozenset[int]:
    """After which numbers of tokens of a prompt its state is to be kept.

    That is at the end of its last whole chunk, for the same prompt and its
    continuations, and where it parts from prompts that came before: what two
    have in common a third may have, too. The prompt is known from now on.
    """
    if not self._max_bytes:
      return frozenset()
    hashes = self._hashes(tokens, salt)
    num_known = sum(key in self._known for key in hashes)
    for key in hashes:
      self._known[key] = None
      self._known.move_to_end(key)
    while len(self._known) > _MOST_KNOWN:
      self._known.popitem(last=False)
    counts = {num_known, len(hashes)} - {0}
    missing = (x for x in counts if hashes[x - 1] not in self._kept)
    return frozenset(x * self._chunk for x in missing)

  def keep(self, tokens: Sequence[int], salt: str, snapshot: Snapshot) -> None:
    """Keeps the state after the first tokens of a prompt, if there is room."""
    parts = {id(part): part for part in snapshot.parts}
    if _num_bytes(parts.values()) > self._max_bytes:
      return
    # A token more, as the hashes leave one to read.
    key = self._hashes(tokens[: snapshot.length + 1], salt)[-1]
    self._drop(key)
    while self._with(parts) > self._max_bytes:
      self._drop(next(iter(self._kept)))
    self.num_bytes = self._with(parts)
    self._parts.update(parts)
    self._uses.update(list(parts))
    self._kept[key] = _bytes(tokens[: snapshot.length]), snapshot

  def _with(self, parts: dict[int, Part]) -> int:
    """Bytes with these parts, too."""
    new = [part for name, part in parts.items() if name not in self._parts]
    return self.num_bytes + _num_bytes(new)

  def _drop(self, key: bytes) -> None:
    if key not in self._kept:
      return
    _, snapshot = self._kept.pop(key)
    for name in {id(part) for part in snapshot.parts}:
      self._uses[name] -= 1
      if not self._uses[name]:
        del self._uses[name]
        self.num_bytes -= self._parts.pop(name).num_bytes

  def _hashes(self, tokens: Sequence[int], salt: str) -> list[bytes]:
    """Of the whole chunks before the last token, each with all before it."""
    key = hashlib.blake2b(
      f'{len(self._root)} {self._root}{salt}'.encode(), digest_size=16
    ).digest()
    content, size = _bytes(tokens), 4 * self._chunk
    hashes = []
    for begin in range(0, (len(tokens) - 1) // self._chunk * size, size):
      part = content[begin : begin + size]
      key = hashlib.blake2b(key + part, digest_size=16).digest()
      hashes.append(key)
    return hashes


def _num_bytes(parts: Iterable[Part]) -> int:
  return sum(part.num_bytes for part in parts)


def _bytes(tokens: Sequence[int]) -> bytes:
  return np.asarray(tokens, '<i4').tobytes()
