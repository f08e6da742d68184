# SPDX-License-Identifier: Apache-2.0
"""Prompts of any length: read in chunks, by a history of bounded size."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import UserError
from jaxsparse.nn.transformer import Cache, Transformer

# Tokens that are read at once, at least.
CHUNK = 512


def can_forget(config: ModelConfig) -> bool:
  """Whether its caches can be of bounded size: nothing sees all tokens."""
  return config.sparse is not None and 'global' not in config.attention_kinds


def with_bounded_history(
  config: ModelConfig, length: int, num_blocks: int | None = None
) -> ModelConfig:
  """The model with sparse layers that forget: its caches are finite.

  Args:
    config: the model, all layers of which are sparse or local.
    length: tokens that a sparse layer's cache is to hold, first block and
      window among them; that of training is what the model knows.
    num_blocks: of history, instead of what makes up `length`.

  Raises:
    UserError: a layer keeps all tokens whatever is done, or there is no room
      for a history.
  """
  if not can_forget(config):
    raise UserError(
      'a bounded history needs a model whose attention is sparse, or sparse '
      f'and local; its attention_pattern is {config.attention_pattern}.'
    )
  sparse = config.sparse
  if num_blocks is None:
    # The first block, the window's, and the one that is being filled.
    fixed = sparse.window_blocks + 2
    num_blocks = length // sparse.block - fixed
    if num_blocks < 1:
      raise UserError(
        f'{length} tokens are {length // sparse.block} blocks of '
        f'{sparse.block}, but the first one and the window take {fixed} and at '
        'least one is of history: name a number of history blocks.'
      )
  return dataclasses.replace(
    config, sparse=dataclasses.replace(sparse, history_blocks=num_blocks)
  )


def chunk_size(config: ModelConfig) -> int:
  """Tokens that are read at once: whole blocks."""
  block = config.sparse.block if config.sparse else 1
  return -(-CHUNK // block) * block


@dataclasses.dataclass(frozen=True)
class Reading:
  """How far a prompt has been read."""

  # The chunk's tokens are from `begin` to `end`.
  begin: int
  end: int
  # Mean negative log-probability of the chunk's tokens and the next one.
  nats_per_token: float


def read(
  config: ModelConfig,
  params: dict,
  inputs: Sequence[np.ndarray],
  cache: Cache,
  on_reading: Callable[[Reading], None],
) -> tuple[Sequence[np.ndarray], Cache]:
  """Feeds a prompt to a cache, but for the last chunk.

  Args:
    config: of the model.
    params: the model's parameters.
    inputs: tokens, positions and segment_ids [B, T].
    cache: an empty one.
    on_reading: called after each chunk.

  Returns:
    The inputs that are left, at least one column, and the cache.
  """
  size = chunk_size(config)
  length = inputs[0].shape[1]
  last = (length - 1) // size * size
  pending = []
  for begin in range(0, last, size):
    part = tuple(x[:, begin : begin + size] for x in inputs)
    targets = inputs[0][:, begin + 1 : begin + size + 1]
    nats, cache = read_chunk(config, params, cache, part, targets)
    pending.append((begin, begin + size, nats))
    if len(pending) > 1:
      # The next chunk runs while the host waits for this one.
      _tell(on_reading, *pending.pop(0))
  for chunk in pending:
    _tell(on_reading, *chunk)
  return tuple(x[:, last:] for x in inputs), cache


def _tell(on_reading, begin, end, nats):
  on_reading(Reading(begin, end, float(nats)))


@functools.partial(jax.jit, static_argnames='config', donate_argnames='cache')
def read_chunk(
  config: ModelConfig,
  params: dict,
  cache: Cache,
  inputs: Sequence[jax.typing.ArrayLike],
  targets: jax.typing.ArrayLike,
) -> tuple[jax.Array, Cache]:
  """Feeds inputs [B, T]; returns the targets' mean loss and the cache."""
  logits, cache, _ = Transformer(config).apply(
    {'params': params}, *inputs, cache
  )
  # No gather: it would need a rule for the mesh.
  is_target = jax.nn.one_hot(targets, logits.shape[-1])
  is_target *= (inputs[2] > 0)[..., None]
  total = (jax.nn.log_softmax(logits) * is_target).sum()
  return -total / jnp.maximum(is_target.sum(), 1), cache
