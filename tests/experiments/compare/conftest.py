# SPDX-License-Identifier: Apache-2.0
"""What several files of tests of comparisons want."""

import jax
import pytest

from jaxsparse import mesh


@pytest.fixture(scope='module')
def one_device():
  with jax.set_mesh(mesh.make_mesh(1, 1, 1, devices=jax.devices()[:1])):
    yield
