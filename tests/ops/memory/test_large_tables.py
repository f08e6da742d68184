# SPDX-License-Identifier: Apache-2.0
"""Tables beyond 2^31 elements, on a CPU, in little memory.

Their memory is 8 GiB that nobody has written to, of which the system provides
only the pages in use: so these tests fail also if anything copies a table.
"""

import ctypes
import resource
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.ops.memory.row_gradient import RowGradient
from jaxsparse.ops.memory.value_bag import value_bag
from jaxsparse.training.optimizers import row_updates

W = 1024
BEYOND = 2**31 // W  # the first row whose elements 32 signed bits don't count
M = BEYOND + 64
SLOTS = (0, 5, BEYOND - 1, BEYOND, BEYOND + 5, M - 1)


@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
def _write_nothing(call):
  """A call into XLA's foreign functions: its result stays as it is allocated.

  Asked for the version of the interface, it states the caller's.
  """
  words = ctypes.POINTER(ctypes.c_size_t)

  def follow(pointer):
    return ctypes.cast(pointer, words)

  _, extension, interface = follow(call)[:3]
  if extension:
    metadata = follow(extension)[3]
    follow(metadata)[3] = follow(interface)[4]


@pytest.fixture
def table():
  """A table [M, W] that XLA may overwrite; memory new to a process is zero."""
  jax.ffi.register_ffi_target(
    'write_nothing', jax.ffi.pycapsule(_write_nothing), platform='cpu'
  )
  shape = jax.ShapeDtypeStruct((M, W), jnp.float32)
  return jax.jit(jax.ffi.ffi_call('write_nothing', shape))()


@pytest.fixture(autouse=True)
def _little_memory():
  before = _peak_bytes()
  yield
  assert _peak_bytes() - before < 2 * 10**8


def _peak_bytes():
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _rows(seed=0):
  return np.asarray(jax.random.normal(jax.random.key(seed), (len(SLOTS), W)))


def _with_rows(table):
  update = RowGradient(jnp.array(SLOTS), jnp.array(_rows()))
  add = jax.jit(row_updates.apply_updates, donate_argnums=0)
  return add(table, update)


def test_rows_are_written_and_read_beyond_2_31_elements(table):
  table = _with_rows(table)
  slot = jnp.array([SLOTS]).T
  weight = jnp.ones((len(SLOTS), 1, 1))
  pooled = value_bag(table, slot, weight)
  np.testing.assert_array_equal(pooled[:, 0], _rows())
  # Where addresses of 32 bits would have led: 2^31 elements or bytes away.
  neighbors = jnp.array([[1, 6, 64 - 1, BEYOND // 4, BEYOND // 2, BEYOND + 1]])
  assert not np.any(value_bag(table, neighbors.T, weight))


def test_weights_get_their_gradient_beyond_2_31_elements(table):
  table = _with_rows(table)
  slot = jnp.array([SLOTS])
  weight = jnp.ones((1, len(SLOTS), 1))
  cotangent = jnp.cos(jnp.arange(1.0, W + 1))

  # Compiled, since only then the table's own gradient is dead code.
  @jax.jit
  def gradient(table, weight):
    pooled, vjp = jax.vjp(lambda w: value_bag(table, slot, w), weight)
    return vjp(jnp.broadcast_to(cotangent, pooled.shape))[0]

  d_weight = gradient(table, weight)
  np.testing.assert_allclose(
    d_weight[0, :, 0], _rows() @ np.asarray(cotangent), rtol=1e-4, atol=1e-4
  )
