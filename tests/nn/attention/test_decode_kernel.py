# SPDX-License-Identifier: Apache-2.0
"""While a GPU decodes, one kernel does what a layer's steps would."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slot_models import BASE, V, make_params

from jaxsparse import mesh
from jaxsparse.inference.fold import fold_for_decode
from jaxsparse.nn.attention import decode
from jaxsparse.nn.transformer import Transformer, init_cache
from jaxsparse.ops.kernels import attend as kernel

B, T, PAD = 2, 8, 3
ONE = dataclasses.replace(BASE, num_layers=1, bias='qkv')


@pytest.fixture
def calls(monkeypatch):
  """As if this were a GPU; the kernel's calls, its oracle in its place."""
  found = []

  def attend(*args, **options):
    found.append(options)
    return kernel.attend_reference(*args, **options)

  monkeypatch.setattr(decode.mesh, 'platform', lambda: 'gpu')
  monkeypatch.setattr(kernel, 'unsupported_reason', lambda *args, **_: None)
  monkeypatch.setattr(kernel, 'attend', attend)
  return found


def fed(config, has_slots):
  """Logits of a prompt, the second one shorter, then of single tokens."""
  params = fold_for_decode(
    config, jax.tree.map(lambda x: x, make_params(config)['params'])
  )
  tokens = np.random.default_rng(0).integers(0, V, (B, T), np.int32)
  place = np.tile(np.arange(T, dtype=np.int32), (B, 1))
  segments = np.ones_like(place)
  if not has_slots:
    # Padded on the left, as `generate` does it.
    segments[1, :PAD], place[1] = 0, np.maximum(place[1] - PAD, 0)

  @jax.jit
  def run(params, *inputs):
    cache, found = init_cache(config, B, T, has_slots), []
    for part in (slice(0, 5), *(slice(i, i + 1) for i in range(5, T))):
      logits, cache, _ = Transformer(config).apply(
        {'params': params}, *(x[:, part] for x in inputs), cache
      )
      found.append(logits)
    return jnp.concatenate(found, axis=1)[:, PAD:], cache

  return run(params, tokens, place, segments)


@pytest.mark.parametrize('has_slots', [False, True])
def test_a_token_is_one_call(has_slots, calls, monkeypatch):
  got = fed(ONE, has_slots)
  assert calls == [dict(num_heads=ONE.num_heads)] * (T - 5)
  with monkeypatch.context() as on_cpu:
    on_cpu.setattr(mesh, 'platform', lambda: 'cpu')
    expected = fed(ONE, has_slots)
  assert len(calls) == T - 5
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    got,
    expected,
  )


@pytest.mark.parametrize(
  'fields',
  [
    dict(attention_pattern=('local',), window=3),
    dict(qk_norm='head'),
    dict(rope_fraction=0.5),
    dict(kv_cache='int8'),
  ],
)
def test_it_is_not_for_all(fields, calls):
  config = dataclasses.replace(ONE, **fields)
  params = jax.eval_shape(
    lambda: fold_for_decode(
      config, jax.tree.map(lambda x: x, make_params(config)['params'])
    )
  )
  token = jax.ShapeDtypeStruct((B, 1), jnp.int32)
  jax.eval_shape(
    lambda params, token: Transformer(config).apply(
      {'params': params}, token, token, token, init_cache(config, B, T)
    ),
    params,
    token,
  )
  assert not calls
