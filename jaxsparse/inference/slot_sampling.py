# SPDX-License-Identifier: Apache-2.0
"""Choosing the next token of each slot, each in its own way.

How a slot draws is in arrays, so that no program depends on it. A draw's
randomness depends on the slot's seed and on the number of the token alone: the
same request gives the same text whatever its neighbours are.

Two ways to draw, of which the second can do what the first does and gives it
the same numbers: `draw` knows temperatures, `draw_sorted` all else too.

Letters: B slots, V tokens, k biased tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxsparse.inference.jobs import JobSampling

# Biases of one slot, at most.
MOST_BIASES = 300
# Best tokens whose log-probabilities are told, at most.
MOST_BEST = 20


class SlotSampling(NamedTuple):
  """How each slot draws, see `JobSampling`, and what it has drawn."""

  temperature: Float[Array, 'B']
  top_k: Int[Array, 'B']
  top_p: Float[Array, 'B']
  min_p: Float[Array, 'B']
  repetition_penalty: Float[Array, 'B']
  presence_penalty: Float[Array, 'B']
  frequency_penalty: Float[Array, 'B']
  seed: UInt[Array, 'B']
  min_tokens: Int[Array, 'B']
  biased: Int[Array, 'B k']
  bias: Float[Array, 'B k']
  # Tokens drawn so far.
  num_drawn: Int[Array, 'B']
  # Of each token: whether the prompt has it, and how often it was drawn. Only
  # `draw_sorted` reads and extends the latter.
  in_prompt: Bool[Array, 'B V']
  counts: Int[Array, 'B V']


class Best(NamedTuple):
  """Log-probabilities of the logits as the model gives them."""

  # Of the token itself.
  logprob: Float[Array, 'B']
  # Of the best tokens, best first.
  top_ids: Int[Array, 'B n']
  top_logprobs: Float[Array, 'B n']


def of_job(sampling: JobSampling) -> dict[str, np.ndarray]:
  """The fields [1, ...] that a new tenant brings."""
  bias = sampling.logit_bias
  biased, added = np.zeros((1, MOST_BIASES), np.int32), None
  added = np.zeros((1, MOST_BIASES), np.float32)
  for i, (token, value) in enumerate(bias):
    biased[0, i], added[0, i] = token, value
  floats = (
    'temperature', 'top_p', 'min_p', 'repetition_penalty', 'presence_penalty',
    'frequency_penalty',
  )  # fmt: skip
  fields = {
    name: np.array([getattr(sampling, name)], np.float32) for name in floats
  }
  for name in ('top_k', 'min_tokens'):
    number = min(getattr(sampling, name), np.iinfo(np.int32).max)
    fields[name] = np.array([number], np.int32)
  seed = np.array([sampling.seed], np.uint32)
  return fields | dict(seed=seed, biased=biased, bias=added)


def init(num_slots: int, vocab_size: int) -> SlotSampling:
  """Of slots that nobody has."""
  of_one = {
    name: jnp.repeat(jnp.asarray(x), num_slots, axis=0)
    for name, x in of_job(JobSampling()).items()
  }
  return SlotSampling(
    **of_one,
    num_drawn=jnp.zeros(num_slots, jnp.int32),
    in_prompt=jnp.zeros((num_slots, vocab_size), bool),
    counts=jnp.zeros((num_slots, vocab_size), jnp.int16),
  )


def taken_over(part: SlotSampling, fields: dict[str, jax.Array]):
  """One slot's part [1, ...] with a new tenant's fields."""
  part = jax.tree.map(jnp.zeros_like, part)
  return part._replace(**fields)


def with_prompt(
  sampling: SlotSampling,
  tokens: Int[Array, 'B T'],
  is_token: Bool[Array, 'B T'],
) -> SlotSampling:
  """Notes tokens of the prompts."""
  rows = jnp.arange(len(tokens))[:, None]
  in_prompt = sampling.in_prompt.at[rows, tokens].max(is_token)
  return sampling._replace(in_prompt=in_prompt)


def with_drawn(
  sampling: SlotSampling,
  tokens: Int[Array, 'B'],
  is_live: Bool[Array, 'B'],
  counts: bool,
) -> SlotSampling:
  """Notes what was drawn; with `counts` also how often."""
  sampling = sampling._replace(num_drawn=sampling.num_drawn + is_live)
  if not counts:
    return sampling
  rows, one = jnp.arange(len(tokens)), is_live.astype(jnp.int16)
  # No more than the type holds.
  one *= sampling.counts[rows, tokens] < np.iinfo(np.int16).max
  return sampling._replace(counts=sampling.counts.at[rows, tokens].add(one))


def draw(
  logits: Float[Array, 'B V'], sampling: SlotSampling
) -> Int[Array, 'B']:
  """The next tokens by temperature alone, int32."""
  best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  is_random = sampling.temperature > 0

  def at_random(logits):
    scaled = _scaled(logits, sampling)
    found = jax.vmap(jax.random.categorical)(_keys(sampling), scaled)
    return found.astype(jnp.int32)

  # Noise for all tokens costs more than to look for the best one.
  found = jax.lax.cond(is_random.any(), at_random, lambda _: best, logits)
  return jnp.where(is_random, found, best)


def draw_sorted(
  logits: Float[Array, 'B V'],
  sampling: SlotSampling,
  stop_ids: tuple[int, ...],
  mask: UInt[Array, 'B W'],
) -> Int[Array, 'B']:
  """The next tokens with all limits and penalties, int32.

  Args:
    logits: of the model.
    sampling: of the slots.
    stop_ids: tokens that end an answer.
    mask: tokens that may be drawn, a bit for each: of token i the bit i mod 32
      of word i // 32, from the lowest on.
  """
  logits = _adjusted(logits, sampling, stop_ids, mask)
  is_limited = (
    (sampling.top_k > 0) | (sampling.top_p < 1) | (sampling.min_p > 0)
  ) & (sampling.temperature > 0)

  def limited(logits):
    return _draw_limited(_scaled(logits, sampling), sampling)

  found = draw(logits, sampling)
  some = jax.lax.cond(is_limited.any(), limited, lambda _: found, logits)
  return jnp.where(is_limited, some, found)


def _draw_limited(logits, sampling):
  """As `sampling.sample` does, with a bound of its own for each row."""
  vocab_size = logits.shape[1]
  ordered, tokens = jax.lax.top_k(logits, vocab_size)
  num_kept = jnp.where(sampling.top_k > 0, sampling.top_k, vocab_size)
  is_kept = jnp.arange(vocab_size)[None] < num_kept[:, None]
  ordered = jnp.where(is_kept, ordered, -jnp.inf)
  probability = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  is_kept = before < sampling.top_p[:, None]
  is_kept &= ordered >= ordered[:, :1] + jnp.log(sampling.min_p)[:, None]
  is_kept = is_kept.at[:, 0].set(True)
  ordered = jnp.where(is_kept, ordered, -jnp.inf)
  choice = jax.vmap(jax.random.categorical)(_keys(sampling), ordered)
  found = jnp.take_along_axis(tokens, choice[:, None], axis=1)
  return found[:, 0].astype(jnp.int32)


def _adjusted(logits, sampling, stop_ids, mask):
  """Logits after penalties and biases; -inf where a token is forbidden."""
  vocab_size = logits.shape[1]
  counts = sampling.counts.astype(jnp.float32)
  is_drawn = counts > 0
  repetition = sampling.repetition_penalty[:, None]
  repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
  logits = jnp.where(is_drawn | sampling.in_prompt, repeated, logits)
  logits -= sampling.presence_penalty[:, None] * is_drawn.astype(jnp.float32)
  logits -= sampling.frequency_penalty[:, None] * counts
  rows = jnp.arange(len(logits))[:, None]
  logits = logits.at[rows, sampling.biased].add(sampling.bias)
  token = jnp.arange(vocab_size)
  is_early = sampling.num_drawn < sampling.min_tokens
  is_stop = (token[:, None] == jnp.array(stop_ids, int)[None]).any(1)
  is_barred = is_early[:, None] & is_stop[None]
  words = jnp.repeat(mask, 32, axis=1)[:, :vocab_size]
  may_be = (words >> (token % 32).astype(jnp.uint32)[None]) & 1 > 0
  return jnp.where(may_be & ~is_barred, logits, -jnp.inf)


def best_of(logits: Float[Array, 'B V'], tokens: Int[Array, 'B']) -> Best:
  """Log-probabilities of the tokens and of the best ones."""
  logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  own = jnp.take_along_axis(logprobs, tokens[:, None], axis=1)[:, 0]
  top, ids = jax.lax.top_k(logprobs, min(MOST_BEST, logits.shape[1]))
  return Best(own, ids.astype(jnp.int32), top)


def _scaled(logits, sampling):
  temperature = sampling.temperature
  return logits / jnp.where(temperature > 0, temperature, 1)[:, None]


def _keys(sampling):
  """As of the first row of `generate_tokens`."""

  def key(seed, number):
    key = jax.random.fold_in(jax.random.key(seed), number)
    return jax.random.fold_in(key, 0)

  return jax.vmap(key)(sampling.seed, sampling.num_drawn)
