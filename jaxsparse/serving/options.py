# SPDX-License-Identifier: Apache-2.0
"""The options of a request: checked, and as the engine takes them."""

import dataclasses
import math
import secrets
from typing import Any

from msgspec import Raw

from jaxsparse.config.errors import shown
from jaxsparse.inference.jobs import JobSampling
from jaxsparse.serving.errors import ApiError, wrong
from jaxsparse.serving.protocol import GenerationRequest, decode

MOST_PROMPTS = 64
MOST_CHOICES = 16
# n times the prompts, for each slot.
CHOICES_A_SLOT = 4
# OpenAI takes 4; evaluations of code send 6 and more.
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 256
MOST_STOP_IDS = 64
MOST_BIASES = 300
MOST_LOGPROBS = 20
_MOST_SALT_CHARACTERS = 256

# Of JSON, spaces among them.
_BYTES_A_BIAS = 64
_BIASES = dict[str, float] | None

# Seeds are uint32.
_SEEDS = 2**32

# Where a slot has no end, an answer for which nobody set one has this.
_UNASKED = 1 << 16

# Below it logits that are divided overflow.
_LEAST_TEMPERATURE = 1e-3


@dataclasses.dataclass(frozen=True)
class Options:
  """What holds for all choices of a request."""

  num_choices: int
  # Choice j of a prompt has the seed of this one plus j.
  sampling: JobSampling
  stop: tuple[str, ...]
  stop_token_ids: tuple[int, ...]
  include_stop: bool
  salt: str
  is_stream: bool
  has_usage: bool
  returns_ids: bool


def of(body: GenerationRequest, vocab_size: int) -> Options:
  """The options of a request.

  Args:
    body: of the request.
    vocab_size: ids of tokens are below it.

  Raises:
    ApiError: one of them is out of its range.
  """
  streams = bool(body.stream)
  if body.stream_options is not None and not streams:
    raise wrong('stream_options', 'stream_options needs stream: true.')
  salt = body.cache_salt or ''
  if len(salt) > _MOST_SALT_CHARACTERS:
    raise wrong(
      'cache_salt',
      f'cache_salt must have at most {_MOST_SALT_CHARACTERS} characters, got '
      f'{len(salt)}.',
    )
  return Options(
    num_choices=int(within('n', body.n, 1, 1, MOST_CHOICES)),
    sampling=_sampling(body, vocab_size),
    stop=_stops(body.stop),
    stop_token_ids=_stop_ids(body.stop_token_ids, vocab_size),
    include_stop=bool(body.include_stop_str_in_output),
    salt=salt,
    is_stream=streams,
    has_usage=bool(
      body.stream_options is not None and body.stream_options.include_usage
    ),
    returns_ids=bool(body.return_token_ids),
  )


def within(
  name: str, value: Any, default: float, least: float, most: float
) -> float:
  """The value, or the default for none; refused outside of its range."""
  if value is None:
    return default
  if not least <= value <= most:
    raise wrong(
      name,
      f'{name} must be within {least:,} and {most:,}, got {shown(value)}.',
    )
  return value


def _sampling(body: GenerationRequest, vocab_size: int) -> JobSampling:
  temperature = within('temperature', body.temperature, 1.0, 0, 100)
  if 0 < temperature < _LEAST_TEMPERATURE:
    raise wrong(
      'temperature',
      f'temperature must be 0 or at least {_LEAST_TEMPERATURE}, got '
      f'{temperature}.',
    )
  top_p = within('top_p', body.top_p, 1.0, 0, 1)
  if top_p == 0:
    raise wrong('top_p', 'top_p must be above 0 and at most 1, got 0.')
  # Others say -1 for all.
  top_k = int(within('top_k', body.top_k, 0, -1, math.inf))
  seed = within('seed', body.seed, secrets.randbelow(_SEEDS), 0, _SEEDS - 1)
  return JobSampling(
    temperature=float(temperature),
    top_k=top_k if 0 < top_k < vocab_size else 0,
    top_p=float(top_p),
    min_p=float(within('min_p', body.min_p, 0.0, 0, 1)),
    repetition_penalty=float(
      within('repetition_penalty', body.repetition_penalty, 1.0, 0.01, 100)
    ),
    presence_penalty=float(
      within('presence_penalty', body.presence_penalty, 0.0, -2, 2)
    ),
    frequency_penalty=float(
      within('frequency_penalty', body.frequency_penalty, 0.0, -2, 2)
    ),
    seed=int(seed),
    min_tokens=int(within('min_tokens', body.min_tokens, 0, 0, 2**31 - 1)),
    ignore_eos=bool(body.ignore_eos),
    logit_bias=_bias(body.logit_bias, vocab_size),
  )


def _bias(raw: Raw, vocab_size: int) -> tuple[tuple[int, float], ...]:
  content = bytes(raw)
  is_long = len(content) > _BYTES_A_BIAS * MOST_BIASES
  given = {} if is_long else decode(content, _BIASES, 'logit_bias') or {}
  if is_long or len(given) > MOST_BIASES:
    raise wrong(
      'logit_bias', f'logit_bias must name at most {MOST_BIASES} tokens.'
    )
  biases = {}
  for key, value in given.items():
    if not (key.isascii() and key.isdigit() and len(key) < 10):
      raise wrong(
        'logit_bias',
        f'logit_bias must map ids of tokens to numbers, got {key[:40]!r}.',
      )
    biases[in_vocabulary('logit_bias', int(key), vocab_size)] = float(
      within('logit_bias', value, 0, -100, 100)
    )
  return tuple(sorted(biases.items()))


def in_vocabulary(name: str, token: int, vocab_size: int) -> int:
  if not 0 <= token < vocab_size:
    raise wrong(
      name,
      f'{name} must hold ids of tokens from 0 to {vocab_size - 1}, got '
      f'{shown(token)}.',
    )
  return token


def _stops(given: str | list[str] | None) -> tuple[str, ...]:
  stops = [given] if isinstance(given, str) else given or []
  if len(stops) > MOST_STOPS:
    raise wrong(
      'stop', f'stop must be at most {MOST_STOPS} strings, got {len(stops)}.'
    )
  for stop in stops:
    if not 1 <= len(stop) <= MOST_STOP_CHARACTERS:
      raise wrong(
        'stop',
        f'stop must hold strings of 1 to {MOST_STOP_CHARACTERS} characters, '
        f'got one of {len(stop)}.',
      )
  return tuple(dict.fromkeys(stops))


def _stop_ids(given: list[int] | None, vocab_size: int) -> tuple[int, ...]:
  ids = given or []
  if len(ids) > MOST_STOP_IDS:
    raise wrong(
      'stop_token_ids',
      f'stop_token_ids must be at most {MOST_STOP_IDS} ids, got {len(ids)}.',
    )
  return tuple(in_vocabulary('stop_token_ids', i, vocab_size) for i in ids)


def check_choices(num_prompts: int, num_choices: int, num_slots: int) -> None:
  """Refuses more texts in one request than the queue is meant for."""
  most = CHOICES_A_SLOT * num_slots
  if num_prompts * num_choices > most:
    raise wrong(
      'n',
      f'n times the number of prompts must be at most {most}, which is '
      f'{CHOICES_A_SLOT} a slot, got {num_choices} times {num_prompts}.',
    )


def room(num_prompt: int, max_tokens: int | None, limit: int, name: str) -> int:
  """Tokens that may be drawn after a prompt.

  Args:
    num_prompt: tokens of the prompt.
    max_tokens: wanted; None for as many as fit.
    limit: rows of a slot.
    name: of the field that holds the prompt.

  Returns:
    `max_tokens`, or less: editors send 65,535 to be safe.

  Raises:
    ApiError: the prompt alone does not fit.
  """
  least = 0 if max_tokens == 0 else 1
  if num_prompt + least > limit:
    raise too_long(num_prompt, limit, name)
  left = limit - num_prompt
  return min(_UNASKED if max_tokens is None else max_tokens, left)


def too_long(num_prompt: int, limit: int, name: str) -> ApiError:
  return ApiError(
    400,
    'context_length_exceeded',
    f'{name} has {num_prompt:,} tokens, but there is room for {limit:,}, what '
    'is to be drawn among them.',
    name,
  )
