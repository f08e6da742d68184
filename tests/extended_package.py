"""Trains with what the guides add; run in a copy of the package that has it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import mesh
from jaxsparse.analysis import cost
from jaxsparse.config import (
  Config,
  DataConfig,
  MemoryConfig,
  ModelConfig,
  OptimizerConfig,
  saved_config,
)
from jaxsparse.config.model import HashedConfig
from jaxsparse.nn.transformer import Transformer, init_cache
from jaxsparse.training.step import init_state, train_step

B, T, V = 4, 12, 11
MODEL = ModelConfig(
  num_layers=2, model_dim=16, num_heads=4, num_kv_heads=2, head_dim=4,
  mlp_dim=24, vocab_size=V, attention_pattern=('linear', 'global'),
  hashed=HashedConfig(blocks=(1,), num_heads=2, num_bits=3, value_dim=8),
  memory=MemoryConfig(
    num_keys=8, key_dim=4, num_selected=4, value_dim=8, placements=((0, 1),)
  ),
)  # fmt: skip
CONFIG = Config(
  model=MODEL,
  data=DataConfig(seq_len=T, batch_size=B),
  optimizer=OptimizerConfig(value_optimizer='row_sign', warmup_steps=1),
)


def batch():
  tokens = np.random.default_rng(0).integers(V, size=(B, T)).astype(np.int32)
  segments = np.repeat([[1] * 5 + [2] * 6 + [0]], B, 0).astype(np.int32)
  positions = np.repeat([[*range(5), *range(6), 0]], B, 0).astype(np.int32)
  return dict(
    tokens=tokens, targets=np.roll(tokens, -1, 1), positions=positions,
    segment_ids=segments, loss_weight=(segments > 0).astype(np.float32),
  )  # fmt: skip


def train(config, shape):
  """Losses of three steps on the same batch, and the tables that changed."""
  with jax.set_mesh(
    mesh.make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
  ):
    state = jax.jit(functools.partial(init_state, config))()
    first = jax.device_get(state.params)
    step = jax.jit(functools.partial(train_step, config))
    losses = []
    for _ in range(3):
      state, metrics = step(state, batch())
      losses.append(float(metrics['loss']))
    return losses, first, jax.device_get(state.params), metrics


def check_cost(params):
  leaves = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert cost.count_parameters(MODEL).total == leaves
  assert cost.forward_flops(MODEL, T) > cost.forward_flops(
    dataclasses.replace(MODEL, hashed=None), T
  )


def check_decoding(params):
  model, tokens = Transformer(MODEL), batch()['tokens']
  segments, positions = jnp.ones_like(tokens), jnp.arange(T)[None].repeat(B, 0)
  whole, _, _ = model.apply({'params': params}, tokens, positions, segments)
  cache, parts = init_cache(MODEL, B, T), []
  for at in (slice(0, 7), slice(7, 8), slice(8, 12)):
    y, cache, _ = model.apply(
      {'params': params}, tokens[:, at], positions[:, at], segments[:, at],
      cache,
    )  # fmt: skip
    parts.append(y)
  np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)
  changed = model.apply(
    {'params': params}, tokens.at[:, 7].add(1) % V, positions, segments
  )[0]
  np.testing.assert_allclose(changed[:, :7], whole[:, :7], atol=1e-6)
  assert not np.allclose(changed[:, 8:], whole[:, 8:])


def main():
  assert saved_config.from_json(saved_config.to_json(CONFIG)) == CONFIG
  losses, first, params, metrics = train(CONFIG, (1, 1, 1))
  assert losses[2] < losses[1] < losses[0]
  assert 'block_01/hashed/weight_mean' in metrics
  table = ('block_00', 'memory', 'value_table')
  for block, layer, name in (table, ('block_01', 'hashed', 'value_table')):
    moved = params[block][layer][name] != first[block][layer][name]
    assert moved.any(axis=1).sum() > 0, layer
  check_cost(params)
  check_decoding(jax.tree.map(jnp.asarray, params))
  split, *_ = train(CONFIG, (2, 2, 1))
  np.testing.assert_allclose(split, losses, rtol=1e-5)


if __name__ == '__main__':
  main()
