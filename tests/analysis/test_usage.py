# SPDX-License-Identifier: Apache-2.0
"""Usage of slots: golden check 16 of the memory layers, and its neighbours."""

import math

import numpy as np
import pytest

from jaxsparse.analysis.usage import SlotUsage, measure


def _is_close(usage, *expected):
  found = (usage.usage_fraction, usage.usage_kl, usage.gini)
  return found == pytest.approx(expected, abs=1e-5)


def test_equal_slots():
  assert _is_close(measure(np.full(256, 7)), 1, 0, 0)


def test_single_slot():
  hits = np.zeros(256, np.int64)
  hits[3] = 10
  assert _is_close(measure(hits), 1 / 256, math.log(256), 1 - 1 / 256)


def test_half_the_slots():
  assert _is_close(measure(np.repeat([5, 0], 128)), 0.5, math.log(2), 0.5)


def test_order_of_slots_does_not_matter():
  hits = np.random.default_rng(0).poisson(3.0, 256)
  shuffled = np.random.default_rng(1).permutation(hits)
  usage = measure(shuffled)
  assert _is_close(
    measure(hits), usage.usage_fraction, usage.usage_kl, usage.gini
  )


def test_pairwise_definition_of_gini():
  hits = np.random.default_rng(0).poisson(3.0, 256)
  pairs = np.abs(hits[:, None] - hits[None, :]).mean()
  assert measure(hits).gini == pytest.approx(pairs / (2 * hits.mean()))


def test_no_hits():
  assert measure(np.zeros(4, np.int64)) == SlotUsage(0.0, 0.0, 0.0)
