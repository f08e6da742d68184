# SPDX-License-Identifier: Apache-2.0
"""What gzip and xz make of the validation text: a yardstick for a model."""

import contextlib
import gzip
import io
import json
import lzma
import os
from typing import Any

from jaxsparse.data.pieces import Corpus

_CACHE = 'compression.json'


def bits_per_byte(corpus: Corpus) -> dict[str, float]:
  """Compressed bits for each byte of the validation text, as one stream.

  Computed once for a corpus and kept beside it.

  Returns:
    The figures of `gzip -9` and `xz -9` under 'gzip' and 'xz'.
  """
  cache = corpus.directory / _CACHE
  if cache.exists():
    return json.loads(cache.read_text())
  counters = dict(gzip=_Counter(), xz=_Counter())
  with (
    gzip.GzipFile(
      fileobj=counters['gzip'], mode='wb', compresslevel=9, mtime=0
    ) as gzip_file,
    lzma.LZMAFile(counters['xz'], 'wb', preset=9) as xz_file,
  ):
    for piece in corpus.validation:
      gzip_file.write(piece.text)
      xz_file.write(piece.text)
  figures = {
    name: 8 * counter.num_bytes / corpus.validation_bytes
    for name, counter in counters.items()
  }
  # A cache that others share may be closed to us.
  with contextlib.suppress(OSError):
    # A reader must never see half a file.
    partial = cache.with_suffix(f'.{os.getpid()}')
    partial.write_text(json.dumps(figures))
    partial.replace(cache)
  return figures


class _Counter(io.RawIOBase):
  """A file that only counts what is written to it."""

  def __init__(self):
    super().__init__()
    self.num_bytes = 0

  def writable(self) -> bool:
    return True

  def write(self, data: Any) -> int:
    self.num_bytes += len(data)
    return len(data)
