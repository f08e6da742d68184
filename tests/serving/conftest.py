# SPDX-License-Identifier: Apache-2.0
"""A server that the tests of a module share."""

import pytest
from running import running


@pytest.fixture(scope='module')
def server():
  with running() as found:
    yield found
