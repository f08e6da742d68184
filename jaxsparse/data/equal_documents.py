# SPDX-License-Identifier: Apache-2.0
"""Documents that stand in training and in another split too."""

import hashlib
from collections.abc import Iterable, Iterator


class EqualDocuments:
  """Counts them while the splits are written, training last.

  Attributes:
    found: by split, the number of its documents that training holds too, and
      their bytes; splits without any are left out.
  """

  def __init__(self):
    self.found: dict[str, list[int]] = {}
    self._held_out: dict[bytes, list[tuple[str, int]]] = {}

  def watch(
    self, split: str, document_pieces: Iterable[tuple[bytes, bool]]
  ) -> Iterator[tuple[bytes, bool]]:
    """Passes on pieces of documents, and whether a document ends with each."""
    text, num_bytes = hashlib.blake2b(digest_size=16), 0
    for piece, ends_document in document_pieces:
      yield piece, ends_document
      text.update(piece)
      num_bytes += len(piece)
      if ends_document:
        self._add(split, text.digest(), num_bytes)
        text, num_bytes = hashlib.blake2b(digest_size=16), 0

  def _add(self, split: str, digest: bytes, num_bytes: int) -> None:
    if split != 'train':
      self._held_out.setdefault(digest, []).append((split, num_bytes))
      return
    # Counted once, however often training repeats it.
    for name, size in self._held_out.pop(digest, ()):
      counts = self.found.setdefault(name, [0, 0])
      counts[0] += 1
      counts[1] += size
