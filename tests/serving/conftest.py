# SPDX-License-Identifier: Apache-2.0
"""A server that the tests of a module share."""

import pathlib
import sys

import pytest

# Of inference's tests, workdirs as runs leave them.
sys.path.append(str(pathlib.Path(__file__).parents[1] / 'inference'))

from running import running


@pytest.fixture(scope='module')
def server():
  with running() as found:
    yield found
