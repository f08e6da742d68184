# SPDX-License-Identifier: Apache-2.0
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference.small_run import save_untrained

import jaxsparse
from jaxsparse import mesh
from jaxsparse.config.errors import UserError

MODEL = jaxsparse.ModelConfig(
  num_layers=2, model_dim=16, num_heads=2, num_kv_heads=2, head_dim=8,
  mlp_dim=16, vocab_size=257,
  memory=jaxsparse.MemoryConfig(
    num_keys=8, num_selected=4, value_dim=8, placements=((0, 1),)
  ),
)  # fmt: skip
AUTO = jax.sharding.AxisType.Auto
TOKENS = np.arange(32).reshape(8, 4) * 7 % 257


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return save_untrained(tmp_path_factory.mktemp('run'), MODEL, 0.3)


@functools.cache
def expected(workdir):
  module, params = jaxsparse.load(workdir)
  assert module.config == MODEL
  plain = jaxsparse.Transformer(MODEL)
  logits, _, _ = jax.jit(plain.apply)({'params': params}, TOKENS)
  np.testing.assert_array_equal(
    logits, jax.jit(module.apply)({'params': params}, TOKENS)
  )
  return np.asarray(logits)


def test_it_gives_logits(workdir):
  assert expected(workdir).shape == (8, 4, 257)
  with pytest.raises(UserError, match='no checkpoint of step 4: it has'):
    jaxsparse.load(workdir, step=4)
  with pytest.raises(UserError, match='has a validation loss'):
    jaxsparse.load(workdir, step='best')


def test_on_our_own_mesh(workdir):
  with jax.set_mesh(mesh.make_mesh(2, 2, 2)):
    module, params = jaxsparse.load(workdir)
    table = params['block_00']['memory']['value_table']
    assert table.addressable_shards[0].data.size < table.size
    logits = jax.jit(module.apply)({'params': params}, jnp.asarray(TOKENS))
  np.testing.assert_allclose(logits, expected(workdir), atol=1e-5)


def test_on_a_guests_mesh(workdir):
  """Of Auto axes, which no array's type tells of."""
  guests = jax.make_mesh((2, 4), ('replica', 'shard'), axis_types=(AUTO, AUTO))
  axes = jaxsparse.Axes(batch=('replica',), rows=('shard',), columns=())
  with jax.set_mesh(guests):
    module, params = jaxsparse.load(workdir, axes=axes)
    table = params['block_00']['memory']['value_table']
    assert table.sharding.spec == jax.P('shard', None)
    logits = jax.jit(module.apply)({'params': params}, TOKENS)
  np.testing.assert_allclose(logits, expected(workdir), atol=1e-5)
