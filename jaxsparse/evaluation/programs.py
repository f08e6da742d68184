# SPDX-License-Identifier: Apache-2.0
"""The one program that scores, on the mesh in use or without one."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.nn.layers import project_to_vocabulary
from jaxsparse.nn.parameter import gathered
from jaxsparse.nn.transformer import Transformer

# Of the logits that are held at once, on each device.
_MOST_BYTES = 1 << 26


@functools.partial(jax.jit, static_argnames='config')
def score(
  config: ModelConfig,
  params: dict,
  tokens: Int[Array, 'B T'],
  targets: Int[Array, 'B T'],
  num_tokens: Int[Array, 'B'],
  num_targets: Int[Array, 'B'],
) -> tuple[Float[Array, 'B'], Bool[Array, 'B']]:
  """Log-probabilities of the last targets of each row, in float32.

  Args:
    config: of the model, with vocab_size set; static.
    params: on one device, or placed on the mesh in use.
    tokens: what the model reads; behind the first `num_tokens` of a row is
      padding, which has segment 0.
    targets: the token after each.
    num_tokens: of each row; a row of padding has none.
    num_targets: how many of the last ones are scored.

  Returns:
    Of each row the sum in nats, and whether every one of these targets has the
    highest logit, the first of equal ones.
  """
  length = tokens.shape[1]
  place = jnp.arange(length)[None]
  segment_ids = (place < num_tokens[:, None]).astype(jnp.int32)
  is_scored = place >= (num_tokens - num_targets)[:, None]
  is_scored &= segment_ids == 1
  # What the vocabulary's matrix reads. The logits that the model returns are
  # not used, so the compiler drops them: [B, T, V] is never held.
  _, kept = Transformer(config).apply(
    {'params': params},
    tokens,
    segment_ids=segment_ids,
    capture_intermediates=lambda module, _: module.name == 'final_norm',
    mutable='intermediates',
  )
  (x,) = kept['intermediates']['final_norm']['__call__']
  table = params['embed']['table'] if config.tie_embeddings else (
    params['output']
  )  # fmt: skip
  table = gathered(table, 'VD', x.dtype)

  def of_chunk(chunk):
    x, targets, is_scored = chunk
    logits = project_to_vocabulary(x, table)
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[2]), 2)
    is_target = vocabulary == targets[..., None]
    # As in training: a masked sum fuses, and shards like the logits.
    picked = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    log_probs = picked - jax.nn.logsumexp(logits, axis=-1)
    is_best = jnp.argmax(logits, axis=-1) == targets
    return (
      jnp.sum(jnp.where(is_scored, log_probs, 0.0), axis=1),
      jnp.all(is_best | ~is_scored, axis=1),
    )

  size = _chunk_size(*tokens.shape, config.vocab_size)
  chunks = [
    jnp.moveaxis(a.reshape(a.shape[0], -1, size, *a.shape[2:]), 1, 0)
    for a in (x, targets, is_scored)
  ]
  sums, are_best = jax.lax.map(of_chunk, chunks)
  return jnp.sum(sums, axis=0), jnp.all(are_best, axis=0)


def _chunk_size(batch_size: int, length: int, vocab_size: int) -> int:
  """Positions whose logits are held at once: a power of two that divides T."""
  rows = -(-batch_size // mesh.num_token_shards())
  most = max(1, _MOST_BYTES // (4 * rows * vocab_size))
  return math.gcd(length, 1 << (most.bit_length() - 1))
