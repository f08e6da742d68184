# SPDX-License-Identifier: Apache-2.0
"""How many generated facts a model has, and how many bits they are.

A fact is recalled when the greedy continuation of its question is the answer,
all of its tokens. That is the same as each of these tokens having the highest
logit after the true ones before it, so one forward pass over questions with
their answers decides it, and nothing is generated.

Bits stored, after arXiv:2404.05405, simplified: for each attribute the number
of people times max(0, log2(choices) - nats / ln 2), where nats is the mean
negative log-probability of the answers (over people; summed over an answer's
tokens), and the sum of that over attributes. Somebody who knows nothing but
the values' evenness stores 0 bits, and who knows everything `People.bits`.
Unlike there, names do not count, and choices are those of the generator.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsparse.config import ModelConfig
from jaxsparse.data.facts import ATTRIBUTES, People
from jaxsparse.data.tokenizer import Tokenizer
from jaxsparse.nn.transformer import Transformer
from jaxsparse.training import evaluation
from jaxsparse.training.losses import token_losses

Batch = dict[str, np.ndarray]
# Logits [B, T, V] of a batch of tokens, positions and segment_ids [B, T].
Forward = Callable[[dict[str, jax.Array]], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recall:
  """What a model has of a set of facts."""

  # Share of all facts that are recalled, and of each attribute's.
  share: float
  share_by_attribute: dict[str, float]
  # Number of facts that are recalled.
  facts: int
  # Bits stored.
  bits: float


def model_forward(config: ModelConfig, params: dict) -> Forward:
  """The trained model."""
  return functools.partial(_logits, config, params)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: dict, batch: dict) -> jax.Array:
  logits, _, _ = Transformer(config).apply(
    {'params': params},
    batch['tokens'],
    batch['positions'],
    batch['segment_ids'],
  )
  return logits


def measure(
  forward: Forward, tokenizer: Tokenizer, people: People, batch_size: int = 768
) -> Recall:
  """Asks for every fact.

  Args:
    forward: of the model.
    tokenizer: with which it was trained.
    people: whose facts they are.
    batch_size: questions at once; the mesh must divide it, if one is set.
  """
  questions = list(people.questions())
  nats, is_right = [], []
  for batch in _batches(questions, tokenizer, batch_size):
    on_mesh = evaluation.to_global(batch)
    some_nats, some_right = jax.device_get(_score(forward(on_mesh), on_mesh))
    nats.append(some_nats)
    is_right.append(some_right)
  # Rows after the last question pad the last batch.
  nats = np.concatenate(nats)[: len(questions)]
  is_right = np.concatenate(is_right)[: len(questions)]
  attribute = np.array([question.attribute for question in questions])
  bits, shares = 0.0, {}
  for i, kind in enumerate(ATTRIBUTES):
    mine = attribute == i
    missing = float(nats[mine].mean()) / math.log(2)
    bits += int(mine.sum()) * max(0.0, kind.bits - missing)
    shares[kind.name] = float(is_right[mine].mean())
  return Recall(
    share=float(is_right.mean()),
    share_by_attribute=shares,
    facts=int(is_right.sum()),
    bits=bits,
  )


@jax.jit
def _score(
  logits: Float[Array, 'B T V'], batch: dict[str, jax.Array]
) -> tuple[Float[Array, ' B'], jax.Array]:
  """Nats of each row's answer, and whether all of it comes first."""
  is_answer = batch['loss_weight'] > 0
  losses = token_losses(logits, batch['targets'])
  is_first = jnp.argmax(logits, axis=-1) == batch['targets']
  return (
    jnp.sum(jnp.where(is_answer, losses, 0.0), axis=1),
    jnp.all(is_first | ~is_answer, axis=1),
  )


def _batches(
  questions: list, tokenizer: Tokenizer, batch_size: int
) -> Iterator[Batch]:
  """Batches of one shape; the answers' tokens have the loss weight 1."""
  rows = [_row(question, tokenizer) for question in questions]
  length = max(len(tokens) for tokens, _ in rows) - 1
  shape = (-(-len(rows) // batch_size) * batch_size, length)
  batch = dict(
    tokens=np.zeros(shape, np.int32),
    targets=np.zeros(shape, np.int32),
    positions=np.broadcast_to(np.arange(length, dtype=np.int32), shape),
    segment_ids=np.zeros(shape, np.int32),
    loss_weight=np.zeros(shape, np.float32),
  )
  for i, (tokens, start) in enumerate(rows):
    end = len(tokens) - 1
    batch['tokens'][i, :end] = tokens[:-1]
    batch['targets'][i, :end] = tokens[1:]
    batch['segment_ids'][i, :end] = 1
    batch['loss_weight'][i, start - 1 : end] = 1
  for first in range(0, shape[0], batch_size):
    yield {name: x[first : first + batch_size] for name, x in batch.items()}


def _row(question, tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
  """The tokens of question and answer, and where the answer's begin.

  A tokenizer may join the question's end with the answer; what is joined is
  part of the answer then.
  """
  before = tokenizer.encode(question.before)
  tokens = tokenizer.encode(question.before + question.answer)
  shared = min(len(before), len(tokens))
  differs = np.flatnonzero(before[:shared] != tokens[:shared])
  return tokens, int(differs[0]) if len(differs) else shared
