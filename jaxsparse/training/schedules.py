# SPDX-License-Identifier: Apache-2.0
"""How the learning rate rises and falls over a run: `optimizer.schedule`."""

import jax.numpy as jnp
import optax

from jaxsparse.config import OptimizerConfig

# The release's warm-up starts from this share of the peak.
WARMUP_START = 0.1


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """The learning rate by the number of steps taken."""
  if config.schedule == 'infinite':
    return _infinite(config, num_steps)
  peak, warmup = config.learning_rate, config.warmup_within(num_steps)
  # As `optax.warmup_cosine_decay_schedule`, which takes no peak that is traced.
  rising = optax.linear_schedule(WARMUP_START * peak, peak, warmup)
  falling = optax.cosine_decay_schedule(
    peak, num_steps - warmup, config.final_lr_fraction
  )
  return optax.join_schedules([rising, falling], [warmup])


def _infinite(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
  """Warm-up, cool-down to a constant, and annealing over the last steps.

  From arXiv:2403.08763, Section 5.3: before the annealing nothing hangs on the
  number of steps, so that a run goes on from there as if it had been longer
  from its beginning.
  """
  peak, warmup = config.learning_rate, config.warmup_within(num_steps)
  constant = config.constant_lr_fraction * peak
  rising = optax.linear_schedule(WARMUP_START * peak, peak, warmup)
  falling = optax.constant_schedule(constant)
  if config.cooldown_steps:
    falling = optax.cosine_decay_schedule(
      peak, config.cooldown_steps, config.constant_lr_fraction
    )
  endless = optax.join_schedules([rising, falling], [warmup])
  if not config.anneal_steps:
    return endless
  begin = num_steps - config.anneal_steps
  last = config.final_lr_fraction * peak

  def schedule(step):
    held = endless(jnp.minimum(step, begin))
    done = jnp.clip((step - begin) / config.anneal_steps, 0.0, 1.0)
    return held * (last / held) ** done

  return schedule


def value_learning_rate(
  config: OptimizerConfig, num_steps: int
) -> optax.Schedule:
  """The model's schedule times a multiplier that falls linearly to 1.

  Or `value_learning_rate`, always, where that is set.
  """
  if config.value_learning_rate:
    return optax.constant_schedule(config.value_learning_rate)
  rate = learning_rate(config, num_steps)
  decay_steps = num_steps * config.value_lr_decay_fraction

  def schedule(step):
    left = jnp.maximum(0.0, 1.0 - step / decay_steps)
    return rate(step) * (1.0 + (config.value_lr_multiplier - 1.0) * left)

  return schedule
