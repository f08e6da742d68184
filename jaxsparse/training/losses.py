# SPDX-License-Identifier: Apache-2.0
"""The language-modelling loss in nats, and what is minimized."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.config import Config


def objective(
  config: Config, loss: jax.Array, metrics: dict, step: jax.Array
) -> jax.Array:
  """What training minimizes: the loss, and what layers add to it.

  The sparsity loss rises linearly from 0 to all of it over the last share
  `sparsity_loss_warmup` of the steps.
  """
  total = loss + metrics['aux_loss']
  if 'sparsity_loss' not in metrics:
    return total
  sparsity_loss = metrics['sparsity_loss']
  num_steps = config.train.num_steps
  if warmup := config.model.sparse.sparsity_loss_warmup * num_steps:
    share = 1 - (num_steps - 1 - step) / warmup
    sparsity_loss *= jnp.clip(share, 0.0, 1.0)
  return total + sparsity_loss


def token_losses(
  logits: Float[Array, 'B T V'], targets: Int[Array, 'B T']
) -> Float[Array, 'B T']:
  """Cross-entropy of every target in nats; `logits` in f32."""
  vocabulary = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[-1]), 2)
  # A masked sum and not a gather: it fuses, and shards like the logits.
  picked = jnp.sum(
    jnp.where(vocabulary == targets[..., None], logits, 0.0), axis=-1
  )
  return jax.nn.logsumexp(logits, axis=-1) - picked
