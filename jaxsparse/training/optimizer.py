"""AdamW with labelled groups: value tables, decayed and undecayed leaves.

The value tables of memory layers have a learning rate of their own, a multiple
of the model's that falls linearly to it over training (UltraMem,
arXiv:2411.12364), and their own weight decay.
"""

import jax
import jax.numpy as jnp
import optax

from jaxsparse.config import OptimizerConfig

# The release's warm-up starts from this share of the peak.
WARMUP_START = 0.1

VALUES, DECAYED, UNDECAYED = 'values', 'decayed', 'undecayed'


def make_optimizer(
  config: OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
  """Clipping by global norm, Adam's moments, then each group's decay and rate.

  Args:
    config: rates and decays.
    num_steps: optimizer steps of the whole run, over which schedules spread.
  """
  rate = learning_rate_schedule(config, num_steps)
  value_rate = value_learning_rate_schedule(config, num_steps)

  def group(weight_decay: float, schedule: optax.Schedule):
    return optax.chain(
      optax.add_decayed_weights(weight_decay),
      optax.scale_by_learning_rate(schedule),
    )

  clip = (
    optax.clip_by_global_norm(config.clip_norm)
    if config.clip_norm
    else optax.identity()
  )
  return optax.chain(
    clip,
    optax.scale_by_adam(config.b1, config.b2, config.epsilon),
    optax.partition(
      {
        VALUES: group(config.value_weight_decay, value_rate),
        DECAYED: group(config.weight_decay, rate),
        UNDECAYED: group(0.0, rate),
      },
      labels,
    ),
  )


def labels(params: dict) -> dict:
  """The group of every leaf: by its name, as no other sign tells them apart."""

  def label(path: tuple, leaf: jax.Array) -> str:
    name = path[-1].key
    if name == 'value_table':
      return VALUES
    # Gains and Tucker cores set scales that decay would pull to zero.
    return UNDECAYED if leaf.ndim < 2 or name == 'cores' else DECAYED

  return jax.tree_util.tree_map_with_path(label, params)


def learning_rate_schedule(
  config: OptimizerConfig, num_steps: int
) -> optax.Schedule:
  """Linear warm-up, then a cosine down to `final_lr_fraction` of the peak."""
  return optax.warmup_cosine_decay_schedule(
    init_value=WARMUP_START * config.learning_rate,
    peak_value=config.learning_rate,
    warmup_steps=config.warmup_steps,
    decay_steps=num_steps,
    end_value=config.final_lr_fraction * config.learning_rate,
  )


def value_learning_rate_schedule(
  config: OptimizerConfig, num_steps: int
) -> optax.Schedule:
  """The model's schedule times a multiplier that falls linearly to 1."""
  rate = learning_rate_schedule(config, num_steps)
  decay_steps = num_steps * config.value_lr_decay_fraction

  def schedule(step):
    left = jnp.maximum(0.0, 1.0 - step / decay_steps)
    return rate(step) * (1.0 + (config.value_lr_multiplier - 1.0) * left)

  return schedule
