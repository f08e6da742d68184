# SPDX-License-Identifier: Apache-2.0
import numpy as np

from jaxsparse.ops.memory import row_ranking
from jaxsparse.ops.memory.row_ranking import (
  NO_ROW,
  BackgroundCounter,
  NewCounter,
  ReadCounts,
  best_rows,
)


def counts_of(new, units, num_units, background=None, num_reads=1):
  """Counts of rows 0, 1, ..., of which those that are not read are left out."""
  rows = np.flatnonzero(new).astype(np.int32)
  background = np.zeros_like(new) if background is None else background
  of = (np.asarray(x)[rows] for x in (new, background, units))
  return ReadCounts(rows, *of, num_reads, num_units)


def test_tf_idf_golden():
  counts = counts_of(np.array([4, 1, 0, 5]), np.array([0, 3, 3, 1]), 3)
  np.testing.assert_allclose(
    row_ranking.tf_idf(counts), [0.5545, 0, 0.3466], atol=5e-5
  )
  assert best_rows(dict(a=counts), 'tfidf', 4)['a'].tolist() == [0, 3]
  assert best_rows(dict(a=counts), 'tfidf', 1)['a'].tolist() == [0]


def test_kl_golden():
  new, background = np.array([4, 1, 5]), np.array([1, 3, 0])
  counts = counts_of(new, background, 3, background, 8)
  expected = [
    0.4 * np.log(0.4 / 0.25), 0.1 * np.log(0.1 / 0.5), 0.5 * np.log(0.5 / 0.125)
  ]  # fmt: skip
  np.testing.assert_allclose(row_ranking.kl(counts), expected)
  assert best_rows(dict(a=counts), 'kl', 3)['a'].tolist() == [0, 2]


def test_best_rows_are_of_all_tables():
  # All rows score log 4 times their share.
  first = counts_of(np.array([1, 0, 6, 3]), np.zeros(4, int), 3)
  second = counts_of(np.array([0, 5, 5]), np.zeros(3, int), 3)
  third = counts_of(np.array([1] * 10), np.zeros(10, int), 3)
  best = best_rows(dict(a=first, b=second, c=third), 'tfidf', 4)
  assert {name: rows.tolist() for name, rows in best.items()} == {
    'a': [2, 3],
    'b': [1, 2],
  }


def test_counts_equal_those_read_by_read():
  rng = np.random.default_rng(0)
  reads = rng.integers(9, size=(3, 2, 8, 4)).astype(np.int32)
  reads[2, 1, 5:] = NO_ROW
  text = rng.integers(2, 40, size=(2, 2, 8, 4)).astype(np.int32)
  text[1, 1, 4:] = NO_ROW
  first = NewCounter()
  for batch in reads:
    first.add(batch)
  rows, new = first.counts()
  assert rows.tolist() == list(range(9))
  assert new.tolist() == [int((reads == row).sum()) for row in rows]
  for unit in (2, 3, 0):
    counter = BackgroundCounter(rows, new, unit)
    for batch in text:
      counter.add(batch)
    counts = counter.counts()
    units = [
      sequence[first : first + (unit or 8)]
      for sequence in text.reshape(-1, 8, 4)
      for first in range(0, 8, unit or 8)
    ]
    units = [x for x in units if (x != NO_ROW).any()]
    assert counts.num_units == len(units)
    assert counts.num_reads == int((text != NO_ROW).sum())
    for row, reads_of, units_of in zip(
      rows, counts.background, counts.units, strict=True
    ):
      assert reads_of == (text == row).sum()
      assert units_of == sum((x == row).any() for x in units)


def test_moved_reads_are_those_of_other_rows():
  before = np.array([[[1, 2, 3], [4, 5, 6], [NO_ROW] * 3]])
  after = np.array([[[3, 2, 1], [4, 7, 1], [NO_ROW] * 3]])
  assert row_ranking.moved_reads(before, after) == (2, 6)


def test_share_of_reads_counts_all_reads_of_the_background():
  counts = counts_of(
    np.array([4, 1, 5]), np.zeros(3, int), 3, np.array([1, 3, 2]), 12
  )
  assert row_ranking.share_of_reads(counts, np.array([0, 2])) == (0.9, 0.25)
