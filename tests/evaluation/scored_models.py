# SPDX-License-Identifier: Apache-2.0
"""Small models of every kind, and the slow way to score by them."""

import dataclasses
import functools
import pathlib
import sys

import jax
import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'inference'))

from small_run import draw_params

from jaxsparse.config import (
  MemoryConfig,
  ModelConfig,
  SparseAttentionConfig,
)
from jaxsparse.config.model import MoEConfig
from jaxsparse.nn.transformer import Transformer

DENSE = ModelConfig(
  num_layers=2, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4,
  mlp_dim=8, vocab_size=257,
)  # fmt: skip
MODELS = dict(
  dense=DENSE,
  untied=dataclasses.replace(DENSE, tie_embeddings=False),
  moe=dataclasses.replace(
    DENSE, moe=MoEConfig(num_experts=4, num_experts_per_token=2, expert_dim=4)
  ),
  memory=dataclasses.replace(
    DENSE,
    memory=MemoryConfig(
      num_keys=8, key_dim=4, num_selected=4, value_dim=8, query_conv_taps=3,
      placements=((0, 1),),
    ),
  ),
  sparse=dataclasses.replace(
    DENSE,
    attention_pattern=('sparse', 'local'),
    window=8,
    sparse=SparseAttentionConfig(
      block=4, tile=4, window_blocks=1, max_blocks=2
    ),
  ),
)  # fmt: skip


@functools.cache
def params(name):
  return draw_params(MODELS[name], deviation=0.3)


@functools.cache
def _logits(name):
  apply = functools.partial(Transformer(MODELS[name]).apply)
  return jax.jit(lambda params, tokens: apply({'params': params}, tokens)[0])


def slowly(name, sequence):
  """Sum of log-probabilities and is_greedy, one sequence alone, unpadded."""
  tokens = np.asarray(sequence.tokens)
  logits = np.asarray(_logits(name)(params(name), tokens[None, :-1]))[0]
  logits = logits.astype(np.float64)
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  rows = np.arange(len(tokens) - 1)
  last = slice(-sequence.num_targets, None)
  return (
    log_probs[rows, tokens[1:]][last].sum(),
    bool((logits.argmax(-1) == tokens[1:])[last].all()),
  )
