# SPDX-License-Identifier: Apache-2.0
"""Libraries' kernels, interpreted on a CPU, beside our own attention."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import mesh
from jaxsparse.config.errors import UserError
from jaxsparse.ops.attention import cpu, libraries
from jaxsparse.ops.attention.dense import attention

B, T, N, K, H = 1, 256, 4, 2, 16
ROWS = np.arange(T, dtype=np.int32)[None]
CALL = libraries.Call(
  length=T,
  num_keys=T,
  num_heads=N,
  num_kv_heads=K,
  width=H,
  dtype=jnp.dtype('float32'),
  window=0,
  is_composed=False,
)


def make_inputs():
  rng = np.random.default_rng(0)
  heads = [rng.normal(size=(B, T, n, H)).astype(np.float32) for n in (N, K, K)]
  segments = np.ones((B, T), np.int32)
  # Two documents and padding at the end.
  segments[:, 100:], segments[:, 250:] = 2, 0
  return heads, segments


def value_and_gradients(function, heads):
  def loss(*heads):
    y = function(*heads)
    return jnp.sin(y).sum(), y

  gradients, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*heads)
  return y, *gradients


@pytest.mark.parametrize(
  ('kernel', 'window', 'is_causal'),
  [
    ('splash', 0, True),
    ('splash', 40, True),
    ('triton', 0, True),
    ('splash', 0, False),
    ('triton', 0, False),
  ],
)
def test_a_kernel_is_our_attention(kernel, window, is_causal, monkeypatch):
  heads, segments = make_inputs()
  how = dict(window=window) if window else {}
  run = functools.partial(getattr(libraries, kernel), interpret=True, **how)
  monkeypatch.setitem(
    libraries._KERNELS,
    'pallas',
    lambda *x, window, is_causal: run(*x, is_causal=is_causal),
  )
  kernel = functools.partial(
    libraries.library_attention,
    'pallas',
    segments=jax.device_put(segments),
    window=window,
    is_causal=is_causal,
  )
  got = value_and_gradients(kernel, heads)
  rows, segments = jax.device_put((ROWS, segments))
  how = dict(window=window, is_causal=is_causal)
  want = value_and_gradients(
    lambda *x: attention(*x, rows, rows, segments, segments, **how), heads
  )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)


def test_auto_takes_a_kernel_that_compiles(monkeypatch):
  """Found while a step is traced on a mesh, whose devices run it apart."""
  kernel = functools.partial(libraries.splash, interpret=True)
  monkeypatch.setitem(libraries._KERNELS, 'pallas', kernel)
  monkeypatch.setattr(mesh, 'platform', lambda: 'tpu')
  heads, segments = make_inputs()
  heads = [np.tile(x, (2, 1, 1, 1)) for x in heads]
  rows, segments = jax.device_put(
    [np.tile(x, (2, 1)) for x in (ROWS, segments)]
  )
  chosen = []

  def run(*heads):
    chosen.append(libraries.choose('auto', CALL))
    return attention(
      *heads, rows, rows, segments, segments, implementation='auto'
    )

  with jax.set_mesh(mesh.make_mesh(2, 1, 2, devices=jax.devices()[:4])):
    placed = [jax.device_put(x, mesh.act('BTN.')) for x in heads]
    got = jax.jit(run)(*placed)
  assert chosen == ['pallas']
  want = jax.jit(attention)(*heads, rows, rows, segments, segments)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_auto_is_xla_on_a_cpu():
  assert libraries.choose('auto', CALL) == 'xla'


@pytest.mark.parametrize('name', libraries.LIBRARIES)
def test_a_choice_that_cannot_run_is_a_sentence(name):
  with pytest.raises(
    UserError, match=f"'{name}' can't run here: .* this is cpu"
  ):
    libraries.choose(name, CALL)


@pytest.mark.parametrize(
  ('backend', 'fields', 'name', 'word'),
  [
    ('gpu', dict(is_composed=True), 'pallas', 'compose heads'),
    ('gpu', dict(num_keys=2 * T), 'pallas', '512 keys for 256'),
    ('gpu', dict(window=8), 'pallas', 'no window'),
    ('gpu', {}, 'cudnn', '16 bits'),
    ('tpu', dict(length=T + 1, num_keys=T + 1), 'pallas', 'multiple of 128'),
    ('tpu', {}, 'cudnn', 'for GPU'),
    ('tpu', dict(has_reach=True), 'pallas', 'knows no prefix'),
  ],
)
def test_why_not(backend, fields, name, word, monkeypatch):
  monkeypatch.setattr(mesh, 'platform', lambda: backend)
  call = dataclasses.replace(CALL, **fields)
  assert word in libraries.unsupported_reason(name, call)


def test_an_unknown_name_is_refused():
  with pytest.raises(UserError, match="'flash' must be one of auto, xla"):
    libraries.choose('flash', CALL)


def test_a_program_for_another_device_has_the_forms_of_that_device():
  """What is compiled ahead of time is what the device would execute."""
  gpu = jax.sharding.AbstractDevice('a GPU', num_cores=1, platform='gpu')
  there = jax.sharding.AbstractMesh((1,), ('data',), abstract_device=gpu)
  assert cpu.leaves_out_later_keys(num_rows=T)
  with jax.sharding.use_abstract_mesh(there):
    assert not cpu.leaves_out_later_keys(num_rows=T)
    assert libraries.unsupported_reason('cudnn', CALL).startswith('it takes')
