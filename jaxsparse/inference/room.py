# SPDX-License-Identifier: Apache-2.0
"""Whether there is memory for a decoding cache, asked before it is made."""

import bisect
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxsparse import mesh
from jaxsparse.analysis import free_memory
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import UserError, require
from jaxsparse.inference.batch_rows import padded
from jaxsparse.inference.long_input import CHUNK, can_forget
from jaxsparse.nn.transformer import Cache, init_cache
from jaxsparse.run import hosts

# Positions and rows of a cache are int32.
_MOST_TOKENS = 2**31 - 1

# Programs were seen to hold up to three times the bytes of a cache and of a
# chunk's scores besides; where far more is free they need not be asked.
_EASILY = 8


def check(
  config: ModelConfig,
  batch_size: int,
  num_prompt: int,
  max_tokens: int,
  temporary_bytes: Callable[[Cache], int] | None = None,
  name: str = 'max_tokens',
) -> None:
  """Refuses what memory has no room for; nothing is allocated.

  Args:
    config: of the model.
    batch_size: sequences at once.
    num_prompt: tokens of the longest prompt.
    max_tokens: tokens to draw.
    temporary_bytes: from an abstract cache to what the programs that use it
      hold on a device besides; where it is costly to ask, only a tight fit asks
      it. None counts the cache alone.
    name: of max_tokens where it was set.

  Raises:
    UserError: there is too little memory, or 32 bits do not count so far.
  """
  require(
    num_prompt + max_tokens - 1 <= _MOST_TOKENS,
    f'{name} and the prompt must be at most {_MOST_TOKENS:,} tokens together, '
    f'as positions have 32 bits, got {max_tokens:,} and {num_prompt:,}.',
  )
  free = _free_bytes()
  if free is None:
    return

  def cache_bytes(max_tokens: int) -> int:
    return _bytes(_abstract_cache(config, batch_size, num_prompt + max_tokens))

  def beside(max_tokens: int) -> int:
    cache = _abstract_cache(config, batch_size, num_prompt + max_tokens)
    return temporary_bytes(cache) if temporary_bytes else 0

  need = cache_bytes(max_tokens)
  scores = _score_bytes(config, batch_size, num_prompt, max_tokens)
  if need <= free < _EASILY * (need + scores):
    need += beside(max_tokens)
  if need <= free:
    return
  # Tokens for which the cache alone has room; then with all else in proportion.
  shorter = range(1, max_tokens)
  most = bisect.bisect_right(shorter, free, key=cache_bytes)
  if most:
    share = 1 + beside(most) / cache_bytes(most)
    most = bisect.bisect_right(shorter, free / share, key=cache_bytes)
  advice = _advice(config, batch_size, most)
  raise UserError(
    f'{name} = {max_tokens:,} after a prompt of {num_prompt:,} tokens'
    f'{f", {batch_size} at once," if batch_size > 1 else ""} needs '
    f'{free_memory.words(need)} for the cache and what is computed with it, '
    f'but {free_memory.words(free)} are free: {advice}.'
  )


def _advice(config: ModelConfig, batch_size: int, most: int) -> str:
  if most:
    # Two digits: how much is free changes all the time.
    unit = 10 ** max(len(str(most)) - 2, 0)
    return f'about {most // unit * unit:,} would fit'
  ways = ['shorten the prompt']
  if batch_size > 1:
    ways.append('take fewer at once')
  if can_forget(config) and not config.sparse.history_blocks:
    ways.append('bound the history (history_blocks)')
  return ' or '.join(ways)


def _score_bytes(
  config: ModelConfig, batch_size: int, num_prompt: int, max_tokens: int
) -> int:
  """Scores of all heads in the longest call, if a layer sees all tokens."""
  sparse = config.sparse
  sees_all = 'global' in config.attention_kinds or (
    'sparse' in config.attention_kinds and not sparse.history_blocks
  )
  pairs = min(CHUNK, num_prompt) * (num_prompt + max_tokens)
  return 4 * padded(batch_size) * config.num_heads * pairs * sees_all


def _abstract_cache(config: ModelConfig, batch_size: int, length: int) -> Cache:
  def init():
    # The last token is drawn, never fed.
    return init_cache(config, padded(batch_size), length - 1)

  devices = jax.sharding.get_mesh()
  if devices.empty:
    return jax.eval_shape(init)
  return mesh.abstract(init, mesh=devices)


def _bytes(tree: Cache) -> int:
  """Of the largest part that a device has."""

  def size(x: jax.ShapeDtypeStruct) -> int:
    shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
    return math.prod(shape) * x.dtype.itemsize

  return sum(map(size, jax.tree.leaves(tree)))


def _free_bytes() -> int | None:
  """Of the device that has least, on all hosts of the mesh in use."""
  devices = jax.sharding.get_mesh()
  if devices.empty:
    return free_memory.of_device(*jnp.zeros(()).devices())
  own = devices.local_devices
  free = [free_memory.of_device(device) for device in own]
  least = None if None in free else min(free)
  if least is not None and own[0].platform == 'cpu':
    least //= len(own)  # They share the host's.
  if devices.is_multi_process:
    # All must come to the same decision.
    least = hosts.gather(least)
    least = None if None in least else min(least)
  return least
