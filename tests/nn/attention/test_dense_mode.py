# SPDX-License-Identifier: Apache-2.0
"""Sparse blocks in full: dense to begin with, and with a least number kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parameters import draw

from jaxsparse.analysis import cost
from jaxsparse.config import Config, ModelConfig, saved_config
from jaxsparse.config.attention import DCMHAConfig, SparseAttentionConfig
from jaxsparse.config.errors import UserError
from jaxsparse.nn.transformer import Transformer, init_cache
from jaxsparse.training.resume import open_workdir, save_config

SPARSE = ModelConfig(
  num_layers=2,
  model_dim=16,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=16,
  vocab_size=11,
  attention_pattern=('local', 'sparse'),
  window=8,
  dcmha=DCMHAConfig(),
  # Room for all blocks, and nothing covers e^20 of itself.
  sparse=SparseAttentionConfig(
    block=4, tile=2, window_blocks=1, max_blocks=8, coverage_logit=20.0
  ),
)
DENSE = dataclasses.replace(
  SPARSE, sparse=dataclasses.replace(SPARSE.sparse, mode='dense')
)
# Without local blocks a window is no setting.
WIDE = dataclasses.replace(SPARSE, window=ModelConfig.window)
T = 24


@pytest.fixture(scope='module')
def params():
  return draw_alike(DENSE)


def draw_alike(config):
  """Parameters with which all rows are to cover alike, as at the start."""
  params = draw(Transformer(config).init, *inputs())['params']
  of_sparse = params['block_01']['attention']['sparse']
  of_sparse |= {name: 0 * of_sparse[name] for name in ('coverage', 'gate')}
  of_sparse['coverage_bias'][:] = config.sparse.coverage_logit
  return params


def inputs():
  rng = np.random.default_rng(1)
  tokens = rng.integers(SPARSE.vocab_size, size=(2, T), dtype=np.int32)
  positions = np.tile(np.arange(T, dtype=np.int32), (2, 1))
  return tokens, positions, np.ones_like(tokens)


@functools.cache
def jitted(config):
  return jax.jit(Transformer(config).apply)


def logits(config, params):
  return jitted(config)({'params': params}, *inputs())


def test_its_parameters_are_those_of_sparse_attention(params):
  of_sparse = jax.eval_shape(
    Transformer(SPARSE).init, jax.random.key(0), *inputs()
  )['params']
  shapes = jax.tree.map(jnp.shape, params)
  assert shapes == jax.tree.map(jnp.shape, of_sparse)
  assert 'dcmha' not in params['block_01']['attention']
  sizes = sum(x.size for x in jax.tree.leaves(params))
  assert cost.count_parameters(DENSE).total == sizes


def test_it_is_sparse_attention_that_keeps_all_blocks(params):
  dense, _, metrics = logits(DENSE, params)
  sparse, _, of_sparse = logits(SPARSE, params)
  np.testing.assert_allclose(dense, sparse, rtol=0, atol=1e-5)
  assert 'sparsity_loss' in of_sparse
  assert 'sparsity_loss' not in metrics


def test_it_is_plain_attention_to_the_bit(params):
  plain = dataclasses.replace(
    WIDE, attention_pattern=('global',), sparse=None, dcmha=None
  )
  alone = dataclasses.replace(
    WIDE, attention_pattern=('sparse',), sparse=DENSE.sparse, dcmha=None
  )
  np.testing.assert_array_equal(
    logits(alone, params)[0], logits(plain, params)[0]
  )


def test_its_cache_gives_the_same(params):
  whole, *_ = logits(DENSE, params)
  run, found = jitted(DENSE), []
  cache = jax.jit(functools.partial(init_cache, DENSE, 2, T))()
  for part in (slice(0, 13), slice(13, 14), slice(14, T)):
    y, cache, _ = run(
      {'params': params}, *(x[:, part] for x in inputs()), cache
    )
    found.append(y)
  np.testing.assert_allclose(np.concatenate(found, 1), whole, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_an_indexer_learns_of_all_blocks():
  """As one beside sparse attention that keeps them all, and without a trace in
  what dense attention gives or learns."""

  def with_indexer(config):
    sparse = dataclasses.replace(config.sparse, router='indexer', router_dim=4)
    return dataclasses.replace(config, sparse=sparse)

  few = dataclasses.replace(DENSE.sparse, max_blocks=1)
  dense = with_indexer(dataclasses.replace(DENSE, sparse=few))
  params = draw_alike(dense)
  _, _, of_sparse = logits(with_indexer(SPARSE), params)

  def both(params, *inputs):
    y, _, metrics = Transformer(dense).apply({'params': params}, *inputs)
    return jnp.stack([jnp.sin(y).sum(), metrics['aux_loss']]), (y, metrics)

  slopes, (y, metrics) = jax.jit(jax.jacobian(both, has_aux=True))(
    params, *inputs()
  )
  # Another program, which newer versions of XLA round otherwise.
  expected = logits(DENSE, params)[0]
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
  layer = 'block_01/attention'
  assert set(metrics) == {
    'aux_loss', f'{layer}/router_loss', f'{layer}/router_entropy'
  }  # fmt: skip
  for name, value in metrics.items():
    np.testing.assert_allclose(value, of_sparse[name], rtol=1e-5)
  for path, (of_y, of_loss) in jax.tree.leaves_with_path(slopes):
    name = jax.tree_util.keystr(path)
    assert (np.abs(of_loss).max() > 0) == ('router' in name), name
    assert 'router' not in name or np.abs(of_y).max() == 0, name


def test_a_run_may_go_on_sparse(tmp_path):
  save_config(Config(model=DENSE), tmp_path)
  _, (told,) = open_workdir(Config(model=SPARSE), tmp_path)
  assert told == "model.sparse.mode: 'dense' -> 'sparse'"
  assert saved_config.from_json(saved_config.to_json(Config(model=DENSE)))


def test_as_many_blocks_are_kept_as_asked_for(params):
  # Where nothing is to be covered only the least number is kept.
  few = dataclasses.replace(
    SPARSE, sparse=dataclasses.replace(SPARSE.sparse, coverage_logit=-20.0)
  )
  bias = params['block_01']['attention']['sparse']['coverage_bias']
  params = jax.tree.map(lambda x: x, params)
  params['block_01']['attention']['sparse']['coverage_bias'] = bias - 40
  for least in (1, 2, 3):
    sparse = dataclasses.replace(few.sparse, min_blocks=least)
    config = dataclasses.replace(few, sparse=sparse)
    kept = logits(config, params)[2]['block_01/attention/kept_blocks']
    # Tiles of 2 rows see 1 to 4 blocks of 4 before the window.
    expected = np.mean([min(least, eligible) for eligible in (1, 2, 3, 4)])
    assert kept == pytest.approx(expected)


def test_it_forgets_nothing():
  with pytest.raises(UserError, match='history_blocks'):
    dataclasses.replace(DENSE.sparse, history_blocks=3)
