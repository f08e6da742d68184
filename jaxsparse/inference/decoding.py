# SPDX-License-Identifier: Apache-2.0
"""Token by token with a cache: the prompt, then one compiled step."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import UserError, require
from jaxsparse.inference import batch_rows, room
from jaxsparse.inference.long_input import (
  Reading,
  chunk_size,
  read,
  read_chunk,
)
from jaxsparse.inference.sampling import Sampling, sample
from jaxsparse.nn.transformer import Cache, Transformer, init_cache

# Tokens, positions and segment_ids of one call, each int32 [B, T].
Inputs = tuple[jax.typing.ArrayLike, jax.typing.ArrayLike, jax.typing.ArrayLike]


def left_pad(
  prompts: Sequence[Sequence[int] | np.ndarray],
) -> Inputs:
  """Prompts of unequal length as one batch that ends together.

  Returns:
    tokens, positions and segment_ids, each int32 [B, T]; padding is token 0 at
    position 0 of segment 0, the prompt is segment 1.

  Raises:
    UserError: there is no prompt, or one holds no token.
  """
  lengths = [len(prompt) for prompt in prompts]
  if not lengths or min(lengths) < 1:
    raise UserError(
      f'prompts must hold at least one token each, got lengths {lengths}.'
    )
  num_columns = max(lengths)
  tokens = np.zeros((len(prompts), num_columns), np.int32)
  positions, segment_ids = np.zeros_like(tokens), np.zeros_like(tokens)
  for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
    tokens[row, num_columns - length :] = prompt
    positions[row, num_columns - length :] = np.arange(length)
    segment_ids[row, num_columns - length :] = 1
  return tokens, positions, segment_ids


@functools.partial(
  jax.jit,
  static_argnames=('config', 'sampling'),
  donate_argnames='cache',
)
def decode_step(
  config: ModelConfig,
  sampling: Sampling,
  params: dict,
  cache: Cache,
  inputs: Inputs,
  seed: jax.Array,
  step: jax.Array,
) -> tuple[jax.Array, Cache, Inputs]:
  """Feeds tokens and draws the next one of each row; prefill and decode alike.

  Args:
    config: the model; static.
    sampling: how to draw; static.
    params: the model's parameters.
    cache: what earlier calls returned; its buffers are reused.
    inputs: tokens, positions and segment_ids [B, T] of this call.
    seed: of the whole generation.
    step: number of tokens drawn before; the key is fold_in(key(seed), step).

  Returns:
    The next tokens [B], the extended cache, and the next call's inputs.
  """
  batch_size, length = inputs[0].shape
  last = None
  if length > 1:
    last = mesh.reshard(
      jnp.full(batch_size, length - 1, jnp.int32), mesh.act('B')
    )
  logits, cache, _ = Transformer(config).apply(
    {'params': params}, *inputs, cache, logits_at=last
  )
  key = jax.random.fold_in(jax.random.key(seed), step)
  # Few enough to draw on every device alike, without a rule for the mesh.
  logits = mesh.reshard(logits[:, -1], mesh.act('.V'))
  token = sample(logits, key, sampling)
  _, positions, segment_ids = (array[:, -1:] for array in inputs)
  return token, cache, (token[:, None], positions + 1, segment_ids)


def generate_tokens(
  model_config: ModelConfig,
  params: dict,
  prompt_ids: Sequence[Sequence[int] | np.ndarray],
  max_tokens: int,
  sampling: Sampling,
  seed: int = 0,
  on_reading: Callable[[Reading], None] = lambda reading: None,
) -> Iterator[np.ndarray]:
  """Continues a batch of prompts; yields tokens as they come.

  Args:
    model_config: with vocab_size set.
    params: the model's parameters, on one device or placed on the mesh in use.
    prompt_ids: one list of token ids for each row, of any length above 0.
    max_tokens: tokens to draw for each row.
    sampling: how to draw.
    seed: the same seed gives the same tokens.
    on_reading: called as long prompts are read, chunk by chunk.

  Yields:
    int32 [B]: the next token of each row, `max_tokens` times. Whoever reads
    stops at will.

  Raises:
    UserError: max_tokens is below 1, a prompt is empty, prompts differ in
      length and the history is bounded, or there is no memory for it all.
  """
  if max_tokens < 1:
    raise UserError(f'max_tokens must be at least 1, got {max_tokens}.')
  if model_config.sparse and model_config.sparse.history_blocks:
    lengths = list(dict.fromkeys(map(len, prompt_ids)))
    # Rows of such a cache are positions, and padding would be in its first.
    require(
      len(lengths) <= 1,
      'prompts of a batch must be equally long where the history is bounded, '
      f'got lengths {" and ".join(map(str, lengths))}: give one at a time.',
    )
  num_prompts, longest = len(prompt_ids), left_pad(prompt_ids)[0].shape[1]
  check_room(model_config, params, num_prompts, longest, max_tokens, sampling)
  # What fills the batch up repeats a prompt, so as to read no other expert.
  num_more = batch_rows.padded(num_prompts) - num_prompts
  inputs = left_pad([*prompt_ids, *[prompt_ids[0]] * num_more])
  tokens = _generate(
    model_config, params, inputs, max_tokens, sampling, seed, on_reading
  )
  return (token[:num_prompts] for token in tokens)


def check_room(
  model_config: ModelConfig,
  params: dict | Callable[[], dict],
  batch_size: int,
  num_prompt: int,
  max_tokens: int,
  sampling: Sampling,
  name: str = 'max_tokens',
) -> None:
  """Refuses a generation that memory has no room for; see `room.check`.

  `params` may be abstract, or a function that makes them so.
  """

  def held(cache: Cache) -> int:
    of_model = params() if callable(params) else params
    num_rows = batch_rows.padded(batch_size)
    return _temporary_bytes(
      model_config, sampling, of_model, num_rows, num_prompt, cache
    )

  room.check(model_config, batch_size, num_prompt, max_tokens, held, name)


def _temporary_bytes(config, sampling, params, batch_size, num_prompt, cache):
  """What the programs of a generation hold beside parameters and cache."""

  def row(num_columns):
    return jax.ShapeDtypeStruct((batch_size, num_columns), np.int32)

  size = chunk_size(config)
  programs = [
    decode_step.lower(
      config, sampling, params, cache, (row(num_columns),) * 3, 0, 0
    )
    for num_columns in {1, (num_prompt - 1) % size + 1}
  ]
  if num_prompt > size:
    inputs = (row(size),) * 3
    programs.append(read_chunk.lower(config, params, cache, inputs, row(size)))
  return max(
    program.compile().memory_analysis().temp_size_in_bytes
    for program in programs
  )


_new_cache = jax.jit(init_cache, static_argnums=(0, 1, 2))


def _generate(config, params, inputs, max_tokens, sampling, seed, on_reading):
  batch_size, length = inputs[0].shape
  # The last token is drawn, never fed.
  cache = _new_cache(config, batch_size, length + max_tokens - 1)
  inputs, cache = read(config, params, inputs, cache, on_reading)
  previous = None
  for step in range(max_tokens):
    token, cache, inputs = decode_step(
      config, sampling, params, cache, inputs, seed, step
    )
    # The device is given the next step before the host waits for this one.
    if previous is not None:
      yield np.asarray(previous)
    previous = token
  yield np.asarray(previous)
