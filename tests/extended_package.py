# SPDX-License-Identifier: Apache-2.0
"""Trains with what the guides add; run in a copy of the package that has it."""

import dataclasses
import functools

import jax
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
)  # fmt: skip
CONFIG = Config(
  model=MODEL,
  data=DataConfig(seq_len=T, batch_size=B),
  optimizer=OptimizerConfig(warmup_steps=1),
)
BY_ROWS = dataclasses.replace(
  CONFIG,
  model=dataclasses.replace(
    MODEL,
    hashed=None,
    memory=MemoryConfig(
      num_keys=8, key_dim=4, num_selected=4, value_dim=8, placements=((0, 1),)
    ),
  ),
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
  """Two calls with a cache give what one gives."""
  tokens = batch()['tokens']
  segments, positions = np.ones_like(tokens), np.arange(T)[None].repeat(B, 0)
  model = jax.jit(Transformer(MODEL).apply)
  inputs = (tokens, positions, segments)
  whole, _, _ = model({'params': params}, *inputs)
  cache, parts = init_cache(MODEL, B, T), []
  for at in (slice(0, 7), slice(7, T)):
    y, cache, _ = model({'params': params}, *(x[:, at] for x in inputs), cache)
    parts.append(y)
  np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)


def check_training(config, block, layer, shape):
  """That it learns, and that some rows move and some don't."""
  losses, first, params, metrics = train(config, shape)
  assert losses[2] < losses[1] < losses[0]
  old, new = (tree[block][layer]['value_table'] for tree in (first, params))
  moved = np.any(old != new, axis=1)
  assert 0 < moved.sum() < len(moved)
  return params, metrics


def main():
  assert saved_config.from_json(saved_config.to_json(CONFIG)) == CONFIG
  params, metrics = check_training(CONFIG, 'block_01', 'hashed', (2, 2, 1))
  assert 'block_01/hashed/weight_mean' in metrics
  check_cost(params)
  check_decoding(params)
  check_training(BY_ROWS, 'block_00', 'memory', (1, 1, 1))


if __name__ == '__main__':
  main()
