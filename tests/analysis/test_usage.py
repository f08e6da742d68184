"""Usage of slots: golden check 16 of the reference, and what counting skips."""

import math

import numpy as np
import pytest

from jaxsparse.analysis import usage


def test_uniform_counts():
  counts = np.full(256, 7)
  assert usage.unevenness(counts) == pytest.approx(0, abs=1e-12)
  assert usage.gini(counts) == pytest.approx(0, abs=1e-12)
  assert usage.share_used(counts) == 1


def test_single_slot():
  counts = np.zeros(256, np.int64)
  counts[3] = 10
  assert usage.unevenness(counts) == pytest.approx(math.log(256))
  assert usage.gini(counts) == pytest.approx(1 - 1 / 256)
  assert usage.share_used(counts) == 1 / 256


def test_half_the_slots():
  counts = np.repeat([5, 0], 32)
  assert usage.unevenness(counts) == pytest.approx(math.log(2))
  assert usage.gini(counts) == pytest.approx(0.5)
  assert usage.share_used(counts) == 0.5


def test_no_hits():
  counts = np.zeros(4, np.int64)
  assert usage.unevenness(counts) == usage.gini(counts) == 0
  assert usage.share_used(counts) == 0


def test_hits_of_batches_add_up_without_padding():
  hits = usage.count_hits(np.array([[[0, 1], [-1, -1]]]), 4)
  hits += usage.count_hits(np.array([1, 3]), 4)
  np.testing.assert_array_equal(hits, [1, 2, 0, 1])


def test_hits_are_all_reads():
  slots = np.random.default_rng(0).integers(0, 64, (3, 5, 32))
  np.testing.assert_array_equal(
    usage.count_hits(slots, 64), [np.sum(slots == i) for i in range(64)]
  )


def test_slot_outside_the_table():
  with pytest.raises(ValueError, match='slot 4 was read, of 4'):
    usage.count_hits(np.array([4]), 4)
