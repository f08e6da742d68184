# SPDX-License-Identifier: Apache-2.0
"""What a memory layer says of one pass: how it is used, and its loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsparse.config import MemoryConfig
from jaxsparse.nn.memory.retrieval import Read
from jaxsparse.nn.parameter import Parameter
from jaxsparse.ops.memory import usage
from jaxsparse.ops.memory.tucker import lower_singular_loss, singular_values

Metrics = dict[str, jax.Array]


def memory_metrics(
  params: dict[str, Parameter],
  read: Read,
  config: MemoryConfig,
  segment_ids: Int[Array, 'B T'] | None = None,
) -> Metrics:
  """Scalars of one pass, from what was read but for padding."""
  scores = jax.lax.stop_gradient(read['scores'])
  scores = scores.reshape(*scores.shape[:2], -1)
  is_token = None if segment_ids is None else segment_ids > 0

  def mean(x):
    return usage.mean_over_tokens(x, is_token).mean()

  score_mean = mean(scores)
  metrics = {
    'aux_loss': jnp.zeros((), jnp.float32),
    'usage_fraction': usage.usage_fraction(read['counts'], config.num_slots),
    'usage_kl': usage.usage_kl(read['counts'], config.num_slots),
    'score_mean': score_mean,
    'score_std': jnp.sqrt(mean(jnp.square(scores - score_mean))),
  }
  if config.grid == 'tucker':
    loss = lower_singular_loss(params['cores'], config.aux_loss_margin)
    metrics['aux_loss'] = config.aux_loss_weight * loss
    values = singular_values(jax.lax.stop_gradient(params['cores'].sum(0)))
    for i, value in enumerate(values.mean(0)):
      metrics[f'core_singular_{i}'] = value
  return metrics
