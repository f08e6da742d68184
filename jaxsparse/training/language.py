# SPDX-License-Identifier: Apache-2.0
"""A language model as what is trained: its parameters, loss and validation."""

import jax
import jax.numpy as jnp

from jaxsparse import mesh
from jaxsparse.config import Config
from jaxsparse.nn.memory.tables import ENTRIES
from jaxsparse.nn.transformer import Transformer
from jaxsparse.ops.memory import usage
from jaxsparse.training.losses import token_losses
from jaxsparse.training.micro_batches import Batch, Metrics


def draw(config: Config) -> dict:
  """The first parameters, whatever the mesh in use."""
  tokens = jnp.zeros((mesh.num_token_shards(), 1), jnp.int32)
  tokens = mesh.reshard(tokens, mesh.act('BT'))
  model = Transformer(config.model)
  key = jax.random.key(config.train.seed)
  return model.init(key, tokens, tokens, tokens)['params']


def loss(
  config: Config,
  variables: dict,
  batch: Batch,
  total_weight: jax.Array,
  key: jax.Array,
) -> tuple[jax.Array, Metrics, dict]:
  """Nats of a micro-batch, as its share of the batch's mean over targets.

  Args:
    config: of the run.
    variables: parameters, and probes of value tables with a row optimizer.
    batch: arrays [B, T].
    total_weight: of the targets of the whole batch.
    key: of dropout.

  Returns:
    The loss, what the layers report, and what they have read.
  """
  (logits, _, metrics), sown = Transformer(config.model).apply(
    variables,
    batch['tokens'],
    batch['positions'],
    batch['segment_ids'],
    deterministic=config.model.dropout_rate == 0,
    rngs={'dropout': key},
    mutable=[ENTRIES],
  )
  losses = token_losses(logits, batch['targets']) * batch['loss_weight']
  return jnp.sum(losses) / total_weight, metrics, sown


def eval_step(config: Config, params: dict, batch: Batch) -> dict:
  """Sums over one batch of validation text.

  Returns:
    `nats` and `targets` summed over the batch, and `slot_counts`: how often
    each memory layer read each of its physical slots, {'block_01': int32 [M]},
    unless these are too many to be counted each,
    and how many tokens passed each expert, {'block_01 experts': int32 [X]}.
  """
  (logits, _, _), sown = Transformer(config.model).apply(
    {'params': params},
    batch['tokens'],
    batch['positions'],
    batch['segment_ids'],
    mutable=['intermediates'],
  )
  losses = token_losses(logits, batch['targets']) * batch['loss_weight']
  counts, model = {}, config.model
  for name, block in sown.get('intermediates', {}).items():
    if 'memory' in block and model.memory.num_slots <= usage.MOST_COUNTED:
      slots = block['memory']['slots'][0]
      counts[name] = _count_reads(slots, model.memory.num_slots, batch)
    if 'moe' in block:
      experts = block['moe']['experts'][0]
      reads = _count_reads(experts, model.moe.num_experts, batch)
      counts[f'{name} experts'] = reads
  return {
    'nats': jnp.sum(losses),
    'targets': jnp.sum(batch['loss_weight']),
    'slot_counts': counts,
  }


def _count_reads(slots: jax.Array, num_slots: int, batch: Batch) -> jax.Array:
  """Reads of every slot [M] by the tokens that are no padding."""
  is_padding = batch['segment_ids'][..., None] == 0
  # Padding falls into a slot of its own, which is dropped.
  slots = jnp.where(is_padding, num_slots, slots)
  count = mesh.over_tokens(lambda s: usage.count_uses(s, num_slots + 1)[None])
  return jnp.sum(count(slots), axis=0)[:num_slots]
