# SPDX-License-Identifier: Apache-2.0
"""While a GPU decodes, one kernel retrieves what the steps would."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import mesh
from jaxsparse.config import MemoryConfig
from jaxsparse.nn.memory import key_scores, retrieval
from jaxsparse.nn.memory.init import parameters
from jaxsparse.ops.kernels import probe
from jaxsparse.ops.kernels import retrieve as kernel

B, D = 5, 16


@pytest.fixture
def calls(monkeypatch):
  """As if this were a GPU; the kernel's calls, its oracle in its place."""
  found = []

  def retrieve(*args, **options):
    found.append(options)
    return kernel.retrieve_reference(*args, **options)

  monkeypatch.setattr(mesh, 'platform', lambda: 'gpu')
  monkeypatch.setattr(probe, 'unsupported_reason', lambda *args, **_: None)
  monkeypatch.setattr(kernel, 'retrieve', retrieve)
  return found


def make_config(**overrides):
  sizes = dict(num_keys=12, key_dim=8, value_dim=16, num_selected=5)
  return MemoryConfig.ultramem(**sizes | overrides).for_width(D)


def arguments(config, keys_dtype, num_positions):
  rng = np.random.default_rng(0)
  weights = {
    name: jnp.asarray(rng.normal(0.5, 0.5, size), jnp.float32)
    for name, (_, _, size) in parameters(config, D, 1).items()
    if not name.endswith('_table')
  }
  weights['keys'] = key_scores.folded(
    weights['keys'].astype(keys_dtype),
    weights.pop('key_scale', None),
    weights.pop('query_scale', None),
    weights['cores'],
    config,
  )
  x = rng.normal(size=(B, num_positions, D))
  return weights, jnp.asarray(x, jnp.float32)


def read_by(config):
  return functools.partial(retrieval.retrieve, config=config, salt=3)


@pytest.mark.parametrize(
  ('options', 'keys_dtype'),
  [
    (dict(split_key_dim=True, key_norm='none'), 'bfloat16'),
    (dict(query='shared', shared_rows=200), 'float32'),
  ],
)
def test_it_is_asked_for_one_position(options, keys_dtype, calls, monkeypatch):
  config = make_config(**options)
  inputs = arguments(config, keys_dtype, 1)
  got = jax.jit(read_by(config))(*inputs)
  assert [call['num_slots'] for call in calls] == [config.num_slots]
  with monkeypatch.context() as on_cpu:
    on_cpu.setattr(mesh, 'platform', lambda: 'cpu')
    expected = jax.jit(read_by(config))(*inputs)
  assert len(calls) == 1
  for name in ('rows', 'slots', 'pools'):
    np.testing.assert_array_equal(got[name], expected[name])
  for name in ('scores', 'weights'):
    np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('options', 'num_positions'),
  [
    ({}, 2),
    (dict(use_two_quadrants=True, num_selected=4), 1),
  ],
)
def test_it_is_not_for_all(options, num_positions, calls):
  config = make_config(**options)
  jax.eval_shape(read_by(config), *arguments(config, 'float32', num_positions))
  assert not calls
