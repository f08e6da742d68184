"""The language-modelling loss, in nats."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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
