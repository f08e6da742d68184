# SPDX-License-Identifier: Apache-2.0
"""Which rows of a memory a new text is about: it reads them, others do not.

Sparse fine-tuning (arXiv:2510.15103) trains these alone. Reads are counted on
the host, for the rows that the new text reads and no others, so that what is
kept does not grow with the table.

Letters: B sequences, T positions, k reads of each, n rows that the new text
reads.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

# A read by padding.
NO_ROW = -1


@dataclasses.dataclass(frozen=True)
class ReadCounts:
  """Reads of the rows of one table.

  Attributes:
    rows: int32 [n], those that the new text reads, ascending.
    new: int64 [n], how often it does.
    background: int64 [n], how often the background does.
    units: int64 [n], how many of the background's units read the row.
    num_reads: of the background, by any row.
    num_units: of the background.
  """

  rows: np.ndarray
  new: np.ndarray
  background: np.ndarray
  units: np.ndarray
  num_reads: int
  num_units: int


class NewCounter:
  """Counts what a new text reads of one table."""

  def __init__(self):
    # Of each batch its distinct rows, and how often each is read.
    self._found: list[tuple[np.ndarray, np.ndarray]] = []

  def add(self, reads: np.ndarray) -> None:
    """Counts reads [...] of a batch, `NO_ROW` for padding."""
    self._found.append(np.unique(reads, return_counts=True))

  def counts(self) -> tuple[np.ndarray, np.ndarray]:
    """The rows [n] that are read, ascending, and how often each is."""
    rows, place = np.unique(
      np.concatenate([rows for rows, _ in self._found]), return_inverse=True
    )
    counts = np.zeros(len(rows), np.int64)
    np.add.at(counts, place, np.concatenate([n for _, n in self._found]))
    is_row = rows != NO_ROW
    return rows[is_row].astype(np.int32), counts[is_row]


class BackgroundCounter:
  """Counts what a background text reads of some rows of one table."""

  def __init__(self, rows: np.ndarray, new: np.ndarray, unit: int):
    """Args:
    rows: what `count_new` returns, as is the next.
    new: likewise.
    unit: positions of a sequence that count as one document; 0 for all.
    """
    self._rows, self._new, self._unit = rows, new, unit
    self._reads = np.zeros(len(rows), np.int64)
    self._units = np.zeros(len(rows), np.int64)
    self._num_reads = self._num_units = 0

  def add(self, reads: np.ndarray) -> None:
    """Counts reads [B, T, k] of a batch, `NO_ROW` for padding."""
    size, length = self._unit or reads.shape[1], reads.shape[1]
    for first in range(0, length, size):
      self._add_units(reads[:, first : first + size].reshape(len(reads), -1))

  def _add_units(self, reads: np.ndarray) -> None:
    """Each of [B, reads] is a unit."""
    is_read = reads != NO_ROW
    self._num_reads += int(is_read.sum())
    self._num_units += int(is_read.any(axis=1).sum())
    if not len(self._rows):
      return
    place = np.minimum(np.searchsorted(self._rows, reads), len(self._rows) - 1)
    is_known = self._rows[place] == reads
    size = len(self._rows)
    self._reads += np.bincount(place[is_known], minlength=size)
    unit = np.broadcast_to(np.arange(len(reads))[:, None], reads.shape)
    pairs = np.unique(unit[is_known] * np.int64(size) + place[is_known])
    self._units += np.bincount(pairs % size, minlength=size)

  def counts(self) -> ReadCounts:
    return ReadCounts(
      self._rows,
      self._new,
      self._reads,
      self._units,
      self._num_reads,
      self._num_units,
    )


def tf_idf(counts: ReadCounts) -> np.ndarray:
  """Share of the new text's reads, times log((N + 1) / (units + 1)).

  A row that every unit of the background reads has none; where units are as
  long as a batch, these are most rows.
  """
  share = counts.new / max(counts.new.sum(), 1)
  return share * np.log((counts.num_units + 1) / (counts.units + 1))


def kl(counts: ReadCounts) -> np.ndarray:
  """Each row's part of the divergence of the new reads from the background's.

  Rows that the background never reads count as read once.
  """
  share = counts.new / max(counts.new.sum(), 1)
  known = (counts.background + 1) / max(counts.num_reads, 1)
  return share * np.log(share / known)


RANKINGS: dict[str, Callable[[ReadCounts], np.ndarray]] = dict(
  tfidf=tf_idf, kl=kl
)


def best_rows(
  counts: Mapping[str, ReadCounts], ranking: str, count: int
) -> dict[str, np.ndarray]:
  """The rows of the highest scores over all tables, int32 and ascending.

  Rows of no positive score are left out, and tables of no such row. Of equal
  scores those of earlier tables and rows come first.

  Args:
    counts: of each table.
    ranking: one of `RANKINGS`.
    count: how many rows, of all tables together.
  """
  names = [name for name, of in counts.items() if len(of.rows)]
  if not names:
    return {}
  scores = [RANKINGS[ranking](counts[name]) for name in names]
  owner = np.repeat(np.arange(len(names)), [len(s) for s in scores])
  rows = np.concatenate([counts[name].rows for name in names])
  scores = np.concatenate(scores)
  order = np.argsort(-scores, kind='stable')[:count]
  order = order[scores[order] > 0]
  best = {
    name: np.sort(rows[order[owner[order] == i]])
    for i, name in enumerate(names)
  }
  return {name: found for name, found in best.items() if len(found)}


def share_of_reads(counts: ReadCounts, rows: np.ndarray) -> tuple[float, float]:
  """Shares of the new text's reads and of the background's that meet `rows`."""
  is_in = np.isin(counts.rows, rows)
  new = counts.new[is_in].sum() / max(counts.new.sum(), 1)
  background = counts.background[is_in].sum() / max(counts.num_reads, 1)
  return float(new), float(background)


def moved_reads(before: np.ndarray, after: np.ndarray) -> tuple[int, int]:
  """How many reads [B, T, k] go to rows that their token did not read, of all.

  `NO_ROW` counts for none.
  """
  is_kept = (after[..., :, None] == before[..., None, :]).any(axis=-1)
  is_read = after != NO_ROW
  return int((is_read & ~is_kept).sum()), int(is_read.sum())
