# SPDX-License-Identifier: Apache-2.0
"""What devices of a GPU and of a TPU mesh send each other for a value bag.

Run with `pytest -m aot`, extra `aot`. The same for CPU devices, and whether
the numbers are right, is in `tests/ops/memory/test_sharded_bag.py`.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
import targets
from compiled import arrays_of_size, payloads

from jaxsparse import mesh as mesh_lib
from jaxsparse.ops.memory.sharded_bag import sharded_value_bag

pytestmark = pytest.mark.aot

# Rows, width, tokens, entries, cores, pools, devices.
M, W, T, k, c, E, P = 2**18, 1024, 512, 64, 2, 4, 8

SCHEMES = dict(columns=(1, 8, 1), rows=(1, 8, 1), grid=(2, 4, 1))
schemes = pytest.mark.parametrize('scheme', SCHEMES)
devices = pytest.mark.parametrize('device', ['h100', 'v5e'])

# What a device has after each transfer, in elements: the entries of all tokens,
# and as many values as its own tokens' pools have.
ENTRIES = [('all-gather', 'f32', c * T * k), ('all-gather', 'u32', T * k)]
POOLS = E * W * T // P
FORWARD = dict(
  columns=[('all-to-all', 'f32', POOLS)],
  rows=[('reduce-scatter', 'f32', POOLS)],
  grid=[('all-to-all', 'f32', POOLS), ('reduce-scatter', 'f32', POOLS)],
)
# An all-gather counts by what it receives.
BACKWARD = dict(
  columns=[('all-to-all', 'f32', POOLS)],
  rows=[('all-gather', 'f32', 8 * POOLS)],
  grid=[('all-to-all', 'f32', POOLS), ('all-gather', 'f32', 2 * POOLS)],
)
# A TPU keeps weights with tokens in its lanes, and so sums all of them.
WEIGHTS = dict(
  h100=[('reduce-scatter', 'f32', c * T * k // P)],
  v5e=[('all-reduce', 'f32', c * T * k)],
)


@functools.cache
def _program(device, scheme, with_gradients):
  tokens = jax.P(mesh_lib.TOKENS)
  mesh = targets.make_mesh(device, SCHEMES[scheme])

  def array(shape, dtype, spec):
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  with jax.set_mesh(mesh):
    table = array((M, W), jnp.float32, mesh_lib.table(scheme))
  slot = array((T, k), jnp.int32, tokens)
  weight = array((T, k, c), jnp.float32, tokens)
  pool = array((T, k), jnp.int32, tokens)
  cotangent = array(
    (T, E, W), jnp.float32, jax.P(mesh_lib.TOKENS, None, 'model')
  )

  def forward(table, slot, weight, pool):
    return sharded_value_bag(table, slot, weight, pool, E, scheme=scheme)

  def gradients(table, slot, weight, pool, cotangent):
    _, vjp = jax.vjp(lambda t, w: forward(t, slot, w, pool), table, weight)
    return vjp(cotangent)

  arguments = (table, slot, weight, pool)
  if with_gradients:
    return targets.compile_for(
      device, gradients, *arguments, cotangent, sizes=SCHEMES[scheme]
    )
  return targets.compile_for(device, forward, *arguments, sizes=SCHEMES[scheme])


@schemes
@devices
def test_forward_sends_entries_and_pools(device, scheme):
  program = _program(device, scheme, False)
  assert payloads(program.text) == sorted(ENTRIES + FORWARD[scheme])


@schemes
@devices
def test_gradients_send_entries_and_pools(device, scheme):
  program = _program(device, scheme, True)
  sent = ENTRIES + BACKWARD[scheme] + WEIGHTS[device]
  assert payloads(program.text) == sorted(sent)


@schemes
@devices
def test_no_table_is_copied_or_gathered(device, scheme):
  for with_gradients in (False, True):
    program = _program(device, scheme, with_gradients)
    for op in ('copy', 'copy-start', 'all-gather', 'all-gather-start'):
      assert not arrays_of_size(program.text, op, M * W // P)
    # The pools of the device group's tokens, not their rows.
    assert program.temp_bytes < 4 * (T * E * W * 4)
