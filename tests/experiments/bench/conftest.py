# SPDX-License-Identifier: Apache-2.0
"""What tests of all benches share."""

import pytest

from jaxsparse.experiments.bench import measuring


@pytest.fixture(scope='module', autouse=True)
def _short_measurements():
  """The machine's rates are for real runs; here they are made up."""
  patch = pytest.MonkeyPatch()
  patch.setattr(measuring, 'copy_bandwidth', lambda: 1e9)
  patch.setattr(measuring, 'matmul_rate', lambda: (1e9, 'float32'))
  patch.setattr(measuring, '_SHORTEST_ROUND', 0)
  yield
  patch.undo()
