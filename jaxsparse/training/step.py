"""TrainState and the two pure functions of training: train and eval step."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxsparse import mesh
from jaxsparse.config import Config
from jaxsparse.nn.transformer import Transformer
from jaxsparse.ops.usage import count_hits
from jaxsparse.training import optimizer as optimizer_lib
from jaxsparse.training.losses import token_losses

# tokens, targets, positions, segment_ids, loss_weight: each [B, T].
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


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
  opt_state = _optimizer(config).init(params)
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state)


def train_step(
  config: Config, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
  """One optimizer step on one global batch.

  The batch's micro-batches are weighed by their targets, so that gradient
  accumulation changes nothing but the rounding.

  Args:
    config: of the run; static.
    state: donated by the caller's jit.
    batch: arrays [B, T].

  Returns:
    The next state and scalars: loss in nats a target, gradient norm, learning
    rates, what the layers report.
  """
  total_weight = jnp.maximum(jnp.sum(batch['loss_weight']), 1.0)
  num_micro = config.optimizer.grad_accumulation
  step_key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)

  def loss_fn(params, micro, key):
    logits, _, metrics = Transformer(config.model).apply(
      {'params': params},
      micro['tokens'],
      micro['positions'],
      micro['segment_ids'],
      deterministic=config.model.dropout_rate == 0,
      rngs={'dropout': key},
    )
    losses = token_losses(logits, micro['targets']) * micro['loss_weight']
    loss = jnp.sum(losses) / total_weight
    metrics = jax.tree.map(lambda m: m / num_micro, metrics)
    objective = loss + metrics.get('aux_loss', 0.0)
    return objective, {'loss': loss, **metrics}

  gradient = functools.partial(jax.grad(loss_fn, has_aux=True), state.params)
  grads, metrics = _sum_over_micro_batches(gradient, batch, num_micro, step_key)

  optimizer = _optimizer(config)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics |= _rates(config, state.step) | {'grad_norm': optax.tree.norm(grads)}
  return TrainState(state.step + 1, params, opt_state), metrics


def eval_step(config: Config, params: dict, batch: Batch) -> dict:
  """Sums over one batch of validation text.

  Returns:
    `nats` and `targets` summed over the batch, and `slot_counts`: how often
    each memory layer read each of its physical slots, {layer: int32 [M]}.
  """
  (logits, _, _), sown = Transformer(config.model).apply(
    {'params': params},
    batch['tokens'],
    batch['positions'],
    batch['segment_ids'],
    mutable=['intermediates'],
  )
  losses = token_losses(logits, batch['targets']) * batch['loss_weight']
  counts = {
    layer: _count_reads(config, block['memory']['slots'][0], batch)
    for layer, block in sown.get('intermediates', {}).items()
  }
  return {
    'nats': jnp.sum(losses),
    'targets': jnp.sum(batch['loss_weight']),
    'slot_counts': counts,
  }


def _count_reads(config: Config, slots: jax.Array, batch: Batch) -> jax.Array:
  """Reads of every slot [M] by the tokens that are no padding."""
  num_slots = config.model.memory.num_slots
  is_padding = batch['segment_ids'][..., None] == 0
  # Padding falls into a slot of its own, which is dropped.
  slots = jnp.where(is_padding, num_slots, slots)
  count = mesh.over_tokens(lambda s: count_hits(s, num_slots + 1)[None])
  return jnp.sum(count(slots), axis=0)[:num_slots]


def _optimizer(config: Config) -> optax.GradientTransformation:
  return optimizer_lib.make_optimizer(config.optimizer, config.train.num_steps)


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


def _sum_over_micro_batches(
  function: Callable, batch: Batch, num_micro: int, key: jax.Array
):
  """The sum of `function(micro_batch, its_key)` over the micro-batches."""
  micros = _split(batch, num_micro)
  first = jax.tree.map(lambda x: x[0], micros)
  rest = jax.tree.map(lambda x: x[1:], micros)
  total = function(first, jax.random.fold_in(key, 0))
  if num_micro == 1:
    return total

  def add(total, xs):
    index, micro = xs
    result = function(micro, jax.random.fold_in(key, index))
    return jax.tree.map(jnp.add, total, result), None

  return jax.lax.scan(add, total, (jnp.arange(1, num_micro), rest))[0]


def _split(batch: Batch, num_micro: int) -> Batch:
  """[B, T] to [num_micro, B / num_micro, T], every device keeping its rows."""

  def split(x: jax.Array) -> jax.Array:
    shape = (x.shape[0] // num_micro, num_micro, *x.shape[1:])
    spec = mesh.act('B..')
    return jnp.moveaxis(jax.lax.reshape(x, shape, out_sharding=spec), 1, 0)

  return jax.tree.map(split, batch)
