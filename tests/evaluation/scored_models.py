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
from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.evaluation.encoding import Encoded
from jaxsparse.evaluation.scorer import Scorer
from jaxsparse.nn.transformer import Transformer

DENSE = ModelConfig(
  num_layers=2,
  model_dim=8,
  num_heads=2,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=8,
  vocab_size=257,
)
# For what asks for several programs.
SMALL = dataclasses.replace(DENSE, num_layers=1)
_MOE = MoEConfig(num_experts=4, num_experts_per_token=2, expert_dim=4)
_MEMORY = MemoryConfig(
  num_keys=8,
  key_dim=4,
  num_selected=4,
  value_dim=8,
  query_conv_taps=3,
  placements=((0, 1),),
)
_PATTERN = dict(
  attention_pattern=('sparse', 'local'),
  window=8,
  sparse=SparseAttentionConfig(block=4, tile=4, window_blocks=1, max_blocks=2),
)
MODELS = dict(
  dense=DENSE,
  untied=dataclasses.replace(DENSE, tie_embeddings=False),
  moe=dataclasses.replace(DENSE, moe=_MOE),
  memory=dataclasses.replace(DENSE, memory=_MEMORY),
  sparse=dataclasses.replace(DENSE, **_PATTERN),
  # In one block: two take twice as long to compile.
  all=dataclasses.replace(
    DENSE,
    num_layers=1,
    moe=_MOE,
    memory=dataclasses.replace(_MEMORY, placements=((0, 0),)),
    attention_pattern=('sparse',),
    sparse=_PATTERN['sparse'],
  ),
)


@functools.cache
def params(name):
  return draw_params(MODELS[name], deviation=0.3)


def scorer(name, batch_tokens=64, max_length=32):
  return Scorer(
    MODELS[name], params(name), ByteTokenizer(), max_length, batch_tokens
  )


@functools.cache
def logits_of(name):
  apply = Transformer(MODELS[name]).apply
  return jax.jit(lambda params, tokens: apply({'params': params}, tokens)[0])


def slowly(name, sequence):
  """Sum of log-probabilities and is_greedy, one sequence alone, unpadded."""
  tokens = np.asarray(sequence.tokens)
  logits = np.asarray(logits_of(name)(params(name), tokens[None, :-1]))[0]
  return judged(logits, sequence)


def judged(logits, sequence):
  """What the logits [T, V] of a sequence make of its targets."""
  logits = logits.astype(np.float64)
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  rows, last = np.arange(len(logits)), slice(-sequence.num_targets, None)
  targets = sequence.tokens[1:]
  return (
    log_probs[rows, targets][last].sum(),
    bool((logits.argmax(-1) == targets)[last].all()),
  )


def sequences(*lengths_and_targets):
  """Beginnings of one sequence, and how many of their last are scored."""
  most = max(length for length, _ in lengths_and_targets)
  tokens = np.random.default_rng(0).integers(0, 257, most + 1, np.int32)
  return [Encoded(tokens[: n + 1], count) for n, count in lengths_and_targets]


def check(scores, expected, tolerance=1e-5):
  for score, (logprob, is_greedy) in zip(scores, expected, strict=True):
    assert abs(score.logprob - logprob) < tolerance
    assert score.is_greedy == is_greedy
