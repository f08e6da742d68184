# SPDX-License-Identifier: Apache-2.0
"""Which of a test's cases are in the default lane."""

from collections.abc import Iterable

import pytest


def few(kept: Iterable, cases: Iterable) -> list:
  """All cases, single arguments or tuples; `slow` but for those kept."""
  kept, cases = list(kept), list(cases)
  assert all(case in cases for case in kept), kept
  return [
    pytest.param(
      *(case if isinstance(case, tuple) else (case,)),
      marks=[] if case in kept else pytest.mark.slow,
    )
    for case in cases
  ]
