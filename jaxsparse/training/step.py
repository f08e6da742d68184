"""TrainState and the two pure functions of training: train and eval step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from jaxsparse import mesh
from jaxsparse.config import Config
from jaxsparse.nn.memory.tables import ENTRIES, table_scheme
from jaxsparse.nn.transformer import Transformer
from jaxsparse.ops.memory.usage import count_hits
from jaxsparse.training import optimizer as optimizer_lib
from jaxsparse.training import table_step
from jaxsparse.training.losses import objective, token_losses
from jaxsparse.training.micro_batches import (
  Batch,
  Metrics,
  over_micro_batches,
  weighed,
)
from jaxsparse.training.optimizer import clip_scale
from jaxsparse.training.optimizers.row_updates import apply_updates


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step changes."""

  # int32 scalar; like the other leaves abstract while nothing is restored yet.
  step: jax.Array | jax.ShapeDtypeStruct
  params: dict
  opt_state: optax.OptState


def init_state(config: Config) -> TrainState:
  """The state before the first step; jit it under the mesh.

  Random numbers do not depend on the mesh.
  """
  tokens = jnp.zeros((mesh.num_token_shards(), 1), jnp.int32)
  tokens = mesh.reshard(tokens, mesh.act('BT'))
  model = Transformer(config.model)
  key = jax.random.key(config.train.seed)
  params = model.init(key, tokens, tokens, tokens)['params']
  if not has_row_optimizer(config):
    opt_state = _optimizer(config).init(params)
  else:
    rest, tables = table_step.split_tables(params)
    opt_state = {
      'rest': _optimizer(config).init(rest),
      'tables': table_step.init_row_state(config, tables),
    }
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


def train_step(
  config: Config, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
  """One optimizer step on one global batch.

  Gradient accumulation changes nothing but the rounding and what layers say of
  their batch in other ways than by a mean over tokens, the experts' balance
  loss above all: `micro_batches` has the list.

  Args:
    config: of the run; static.
    state: donated by the caller's jit.
    batch: arrays [B, T].

  Returns:
    The next state and scalars: loss in nats a target, gradient norm, learning
    rates, what the layers report; with a row optimizer how many rows it took.
  """
  total_weight = jnp.maximum(jnp.sum(batch['loss_weight']), 1.0)
  num_micro = config.optimizer.grad_accumulation
  key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
  params, tables, taps = state.params, {}, {}
  if has_row_optimizer(config):
    params, tables = table_step.split_tables(params)
    num_rows, length = batch['tokens'].shape
    taps = table_step.make_taps(config.model, num_rows // num_micro, length)

  def loss_fn(params, taps, micro, share, key):
    (logits, _, metrics), sown = Transformer(config.model).apply(
      {'params': table_step.with_tables(params, tables), **taps},
      micro['tokens'],
      micro['positions'],
      micro['segment_ids'],
      deterministic=config.model.dropout_rate == 0,
      rngs={'dropout': key},
      mutable=[ENTRIES],
    )
    losses = token_losses(logits, micro['targets']) * micro['loss_weight']
    loss = jnp.sum(losses) / total_weight
    metrics = weighed(metrics, share)
    total = objective(config, loss, metrics, state.step)
    return total, ({'loss': loss, **metrics}, sown)

  def gradient(micro, share, key):
    gradients, (metrics, sown) = jax.grad(loss_fn, (0, 1), has_aux=True)(
      params, taps, micro, share, key
    )
    read = table_step.table_gradients(config.model, gradients[1], sown)
    return gradients[0], metrics, read

  grads, metrics, read = over_micro_batches(gradient, batch, num_micro, key)
  metrics |= _rates(config, state.step)
  params, opt_state, more = _update(config, state, grads, read, key)
  return TrainState(state.step + 1, params, opt_state), metrics | more


def up_to_date(config: Config, state: TrainState) -> TrainState:
  """The state with all rows of value tables where dense AdamW has them.

  To validate and to export: `row_adam` brings absent rows up to date only when
  they return.
  """
  is_behind = config.optimizer.value_optimizer == 'row_adam'
  if not (is_behind and has_row_optimizer(config)):
    return state
  rest, tables = table_step.split_tables(state.params)
  tables, row_state = table_step.caught_up_tables(
    config, tables, state.opt_state['tables']
  )
  return TrainState(
    state.step,
    table_step.with_tables(rest, tables),
    state.opt_state | {'tables': row_state},
  )


def has_row_optimizer(config: Config) -> bool:
  """Whether value tables have an optimizer of their own, by rows."""
  has_tables = config.model.memory is not None
  return has_tables and config.optimizer.value_optimizer != 'adamw'


def _update(
  config: Config, state: TrainState, grads: dict, read: dict, key: jax.Array
) -> tuple[dict, optax.OptState, Metrics]:
  """Parameters and optimizer state after the step, and scalars."""
  optimizer = _optimizer(config)
  only_trained = functools.partial(optimizer_lib.only_trained, config.optimizer)
  grads = only_trained(grads)
  rounding_key = None
  if not config.optimizer.value_master:
    # Numbers below this are those of the micro-batches.
    num_micro = config.optimizer.grad_accumulation
    rounding_key = jax.random.fold_in(key, num_micro)

  def update(params, opt_state, norm):
    scale = clip_scale(norm, config.optimizer.clip_norm)
    scaled = jax.tree.map(lambda g: (g * scale).astype(g.dtype), grads)
    updates, opt_state = optimizer.update(scaled, opt_state, params)
    # Without their decay, too.
    updates = only_trained(updates)
    return apply_updates(params, updates, rounding_key), opt_state

  if not has_row_optimizer(config):
    norm = jnp.sqrt(optimizer_lib.squared_norm(grads))
    params, opt_state = update(state.params, state.opt_state, norm)
    return params, opt_state, {'grad_norm': norm}
  params, tables = table_step.split_tables(state.params)
  opt_state = state.opt_state
  tables, row_state, norm, rows = table_step.update_tables(
    config,
    tables,
    opt_state['tables'],
    read,
    optimizer_lib.squared_norm(grads),
    state.step,
    rounding_key,
  )
  params, rest_state = update(params, opt_state['rest'], norm)
  opt_state = {'rest': rest_state, 'tables': row_state}
  params = table_step.with_tables(params, tables)
  return params, opt_state, rows | {'grad_norm': norm}


def eval_step(config: Config, params: dict, batch: Batch) -> dict:
  """Sums over one batch of validation text.

  Returns:
    `nats` and `targets` summed over the batch, and `slot_counts`: how often
    each memory layer read each of its physical slots, {'block_01': int32 [M]},
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
    if 'memory' in block:
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
  count = mesh.over_tokens(lambda s: count_hits(s, num_slots + 1)[None])
  return jnp.sum(count(slots), axis=0)[:num_slots]


def _optimizer(config: Config) -> optax.GradientTransformation:
  memory = config.model.memory
  scheme = table_scheme(memory, config.model.dtype) if memory else 'columns'
  moe = config.model.moe
  return optimizer_lib.make_optimizer(
    config.optimizer,
    config.train.num_steps,
    scheme,
    moe.bias_update_rate if moe else 0.0,
  )


def _rates(config: Config, step: jax.Array) -> Metrics:
  schedules = {
    'learning_rate': optimizer_lib.learning_rate_schedule,
    'value_learning_rate': optimizer_lib.value_learning_rate_schedule,
  }
  if config.model.memory is None:
    del schedules['value_learning_rate']
  return {
    name: schedule(config.optimizer, config.train.num_steps)(step)
    for name, schedule in schedules.items()
  }
