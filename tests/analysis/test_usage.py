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


def test_counts_accumulate_over_batches_without_padding():
  counts = usage.SlotCounts(4)
  counts.add(
    {'block_01': np.array([[[0, 1], [-1, -1]]]), 'block_05': np.array([2])}
  )
  counts.add({'block_01': np.array([1, 3])})
  np.testing.assert_array_equal(counts.by_layer['block_01'], [1, 2, 0, 1])
  np.testing.assert_array_equal(counts.by_layer['block_05'], [0, 0, 1, 0])
  summary = counts.summary()
  assert summary['block_01/memory/slots_used_in_pass'] == 0.75
  assert summary['block_05/memory/unevenness_in_pass'] == pytest.approx(
    math.log(4)
  )


def test_counts_of_one_layer_are_all_its_reads():
  slots = np.random.default_rng(0).integers(0, 64, (3, 5, 32))
  counts = usage.SlotCounts(64)
  counts.add({'block_01': slots})
  np.testing.assert_array_equal(
    counts.by_layer['block_01'], [np.sum(slots == i) for i in range(64)]
  )


def test_slot_outside_the_table():
  with pytest.raises(ValueError, match='block_01 read slot 4 of 4'):
    usage.SlotCounts(4).add({'block_01': np.array([4])})
