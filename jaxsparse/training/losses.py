"""The language-modelling loss in nats, and what is minimized."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.config import Config


def objective(
  config: Config, loss: jax.Array, metrics: dict, step: jax.Array
) -> jax.Array:
  """What training minimizes: the loss, and what layers add to it.

  The price of kept blocks rises linearly from 0 to all of it over the last
  share `budget_ramp` of the steps.
  """
  total = loss + metrics['aux_loss']
  if 'block_price' not in metrics:
    return total
  price = metrics['block_price']
  num_steps = config.train.num_steps
  if ramp := config.model.sparse.budget_ramp * num_steps:
    price *= jnp.clip(1 - (num_steps - 1 - step) / ramp, 0.0, 1.0)
  return total + price


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
