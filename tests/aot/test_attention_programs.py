# SPDX-License-Identifier: Apache-2.0
"""Kernels of libraries for attention, compiled for their devices.

Run with `pytest -m aot`, extra `aot`. Forward and both gradients.
"""

import functools

import jax
import jax.numpy as jnp
import pytest
import targets

from jaxsparse import mesh
from jaxsparse.ops.attention import libraries
from jaxsparse.ops.attention.dense import attention
from jaxsparse.ops.quantized_rows import QuantizedRows

pytestmark = pytest.mark.aot

LENGTH, HEADS, KV_HEADS = 2048, 8, 2


@pytest.fixture
def compiled(monkeypatch):
  """The program of a kernel by its name, as `library_attention` runs it."""

  def compile_kernel(target, kernel, dtype, width, sizes=(1, 1, 1), window=0):
    run = getattr(libraries, kernel)
    if window:
      run = functools.partial(run, window=window)
    kernels = dict(pallas=lambda *heads, window: run(*heads))
    monkeypatch.setattr(libraries, '_KERNELS', kernels)
    return _program(target, dtype, width, sizes)

  return compile_kernel


def _program(target, dtype, width, sizes):
  def loss(query, key, value, segments):
    y = libraries.library_attention('pallas', query, key, value, segments)
    return y.astype(jnp.float32).sum()

  def sharding(dims):
    devices = targets.make_mesh(target, sizes)
    with jax.set_mesh(devices):
      return jax.sharding.NamedSharding(devices, mesh.act(dims))

  def heads(number):
    shape = (sizes[0], LENGTH, number, width)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding('BTN.'))

  segments = jax.ShapeDtypeStruct(
    (sizes[0], LENGTH), jnp.int32, sharding=sharding('BT')
  )
  return targets.compile_for(
    target,
    jax.grad(loss, (0, 1, 2)),
    heads(HEADS),
    heads(KV_HEADS),
    heads(KV_HEADS),
    segments,
    sizes=sizes,
  )


@pytest.mark.parametrize(
  ('target', 'kernel', 'dtype', 'width', 'window'),
  [
    ('v5e', 'splash', jnp.bfloat16, 128, 0),
    ('v5e', 'splash', jnp.bfloat16, 128, 256),
    ('v5e', 'splash', jnp.float32, 64, 0),
    ('h100', 'triton', jnp.bfloat16, 64, 0),
    ('h100', 'triton', jnp.bfloat16, 128, 0),
  ],
)
def test_it_compiles_and_keeps_no_scores(
  compiled, target, kernel, dtype, width, window
):
  program = compiled(target, kernel, dtype, width, window=window)
  assert 'custom-call' in program.text
  # Half of one head's scores in the smallest type.
  assert program.temp_bytes < 16 * HEADS * LENGTH * width * 4
  assert f'{LENGTH},{LENGTH}]' not in program.text


@pytest.mark.parametrize(
  ('target', 'kernel', 'width'),
  [('v5e', 'splash', 128), ('h100', 'triton', 64)],
)
def test_devices_run_it_on_their_own_heads(compiled, target, kernel, width):
  program = compiled(target, kernel, jnp.bfloat16, width, sizes=(2, 1, 2))
  assert 'custom-call' in program.text
  for transfer in ('all-gather', 'all-to-all', 'collective-permute'):
    assert transfer not in program.text


@pytest.mark.parametrize('target', ['h100', 'v5e'])
def test_codes_become_numbers_as_they_are_multiplied(target, monkeypatch):
  """Where no kernel reads them; on a CPU it takes parts of them."""
  platform = 'tpu' if target == 'v5e' else 'gpu'
  monkeypatch.setattr(mesh, 'platform', lambda: platform)
  # As they lie in a cache.
  shape = (8, KV_HEADS, LENGTH, 128)
  rows = QuantizedRows(
    jax.ShapeDtypeStruct(shape, jnp.int8),
    jax.ShapeDtypeStruct(shape[:-1], jnp.float32),
  )

  def read(query, key, value, *ids):
    turned = (
      jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), x) for x in (key, value)
    )
    return attention(query, *turned, *ids)

  program = targets.compile_for(
    target,
    read,
    jax.ShapeDtypeStruct((8, 1, HEADS, 128), jnp.bfloat16),
    rows,
    rows,
    *[jax.ShapeDtypeStruct((8, n), jnp.int32) for n in (1, LENGTH)] * 2,
  )
  num_codes = 8 * KV_HEADS * LENGTH * 128
  assert program.temp_bytes < num_codes / 2
