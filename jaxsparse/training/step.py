# SPDX-License-Identifier: Apache-2.0
"""TrainState, and the pure function that makes the next one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from jaxsparse.config import Config
from jaxsparse.nn.memory.tables import table_scheme
from jaxsparse.run import table_leaves
from jaxsparse.training import (
  adapters,
  schedules,
  table_step,
  tasks,
  trained_part,
)
from jaxsparse.training import loss_scale as loss_scale_lib
from jaxsparse.training import optimizer as optimizer_lib
from jaxsparse.training.losses import objective
from jaxsparse.training.micro_batches import (
  Batch,
  Metrics,
  over_micro_batches,
  weighed,
)
from jaxsparse.training.optimizers.finalizing import (
  Optimizer,
  merged,
  state_of,
  with_state,
)
from jaxsparse.training.optimizers.row_updates import (
  apply_updates,
  clip_scale,
  scaled,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything that a step changes."""

  # int32 scalar; like the other leaves abstract while nothing is restored yet.
  step: jax.Array | jax.ShapeDtypeStruct
  # Those that are trained; what stands beside them is `frozen` everywhere.
  params: dict
  opt_state: optax.OptState
  # Of float16 alone.
  loss_scale: loss_scale_lib.LossScale | None = None


def init_state(config: Config) -> TrainState:
  """The state before the first step; jit it under the mesh.

  Random numbers do not depend on the mesh.
  """
  return init_parts(config)[0]


def init_parts(config: Config) -> tuple[TrainState, dict]:
  """`init_state`, and the parameters that `optimizer.trained` leaves alone."""
  return _parts(config, tasks.of(config).draw(config))


def _parts(config: Config, params: dict) -> tuple[TrainState, dict]:
  trained_part.require_any(config.optimizer, params)
  trained, frozen = trained_part.split(config.optimizer, params)
  return _at_step_0(config, trained), frozen


def parts_from(
  config: Config, params: dict, elsewhere: dict | None = None
) -> tuple[TrainState, dict]:
  """`init_parts` from given parameters, which are kept.

  With an adapter they are its base, and all of them frozen.

  Args:
    config: of the run.
    params: without the tables that lie elsewhere.
    elsewhere: these, or their shapes, by their paths.
  """
  if config.adapter.kind:
    draw = jax.jit(functools.partial(adapters.init, config))
    trained, frozen = draw(params), params
  else:
    everything = table_leaves.joined(params, elsewhere or {})
    trained_part.require_any(config.optimizer, everything)
    trained, frozen = trained_part.split(config.optimizer, params)

  # `params` pass by the program, which would copy them.
  @jax.jit
  def rest(params):
    return dataclasses.replace(_at_step_0(config, params), params=None)

  return dataclasses.replace(rest(trained), params=trained), frozen


def _at_step_0(config: Config, params: dict) -> TrainState:
  opt_state = optimizer_of(config).init(params)
  scale = loss_scale_lib.first(config.model.dtype)
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state, scale)


def init_beside(config: Config) -> tuple[TrainState, dict]:
  """`init_parts` of a run whose tables lie elsewhere: without them."""
  params = tasks.of(config).draw(config)
  trained_part.require_any(config.optimizer, params)
  trained, frozen = (
    table_leaves.split(part)[0]
    for part in trained_part.split(config.optimizer, params)
  )
  return _at_step_0(config, trained), frozen


def train_step(
  config: Config, state: TrainState, batch: Batch, frozen: dict | None = None
) -> tuple[TrainState, Metrics]:
  """One optimizer step on one global batch.

  In float16, a step whose gradients are not finite changes no parameter and no
  state of an optimizer, but it counts, and takes its batch.

  Gradient accumulation changes nothing but the rounding and what layers say of
  their batch in other ways than by a mean over tokens, the experts' balance
  loss above all: `micro_batches` has the list.

  Args:
    config: of the run; static.
    state: donated by the caller's jit.
    batch: arrays [B, T].
    frozen: parameters that are only read, if there are any; not donated.

  Returns:
    The next state and scalars: loss in nats a target, gradient norm, learning
    rates, what the layers report; with a row optimizer how many rows it took;
    in float16 the 'loss_scale' of this step and 'overflows', steps left out so
    far.
  """
  state, metrics, _ = _step(config, state, batch, frozen or {}, None)
  return state, metrics


def step_beside(
  config: Config,
  state: TrainState,
  tables: dict[str, jax.Array],
  batch: Batch,
  frozen: dict | None = None,
) -> tuple[TrainState, Metrics, table_step.TableGradients | None]:
  """`train_step` of a run whose tables lie elsewhere, without their update.

  Args:
    config: of the run, static; its value tables have a row optimizer.
    state: without the tables; the state of their optimizer is its scalars,
      which are returned as they are.
    tables: by their paths, such as 'block_01/memory/value_table'.
    batch: arrays [B, T].
    frozen: see `train_step`.

  Returns:
    What `train_step` does, and the gradients of the tables; none if
    they are not trained.
  """
  return _step(config, state, batch, frozen or {}, tables)


def rounding_key(config: Config, step: jax.Array) -> jax.Array | None:
  """The key by which the step after `step` others is rounded; None: nearest."""
  if config.optimizer.value_master:
    return None
  key = jax.random.fold_in(jax.random.key(config.train.seed), step)
  # Numbers below this are those of the micro-batches.
  return jax.random.fold_in(key, config.optimizer.grad_accumulation)


def _step(config, state, batch, frozen, elsewhere):
  """`train_step`, or with tables elsewhere `step_beside`."""
  task = tasks.of(config)
  total_weight = jnp.maximum(jnp.sum(batch['loss_weight']), 1.0)
  num_micro, scale = config.optimizer.grad_accumulation, state.loss_scale
  key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
  # By rows, tables get no gradient but the probes do.
  rest, tables, probes, has_rows = state.params, None, {}, False
  if elsewhere is not None:
    has_rows = trained_part.trains_tables(config.optimizer, elsewhere)
  elif optimizer_lib.is_by_rows(config.optimizer):
    rest, tables = table_step.split_tables(state.params)
    has_rows = bool(jax.tree.leaves(tables))
    rest, tables = (rest, tables) if has_rows else (state.params, None)
  if has_rows:
    num_rows, length = batch['tokens'].shape
    probes = table_step.make_probes(config.model, num_rows // num_micro, length)

  def loss_fn(rest, probes, micro, share, key):
    params = rest if tables is None else merged(rest, tables)
    if elsewhere is not None:
      params = table_leaves.joined(rest, elsewhere)
    params = adapters.join(config, frozen, params)
    loss, metrics, sown = task.loss(
      config, {'params': params, **probes}, micro, total_weight, key
    )
    metrics = weighed(metrics, share)
    total = objective(config, loss, metrics, state.step)
    total = loss_scale_lib.multiplied(total, scale)
    return total, ({'loss': loss, **metrics}, sown)

  value_and_grad = jax.value_and_grad(loss_fn, (0, 1), has_aux=True)

  def gradient(micro, share, key):
    (_, (metrics, sown)), (grads, of_probes) = value_and_grad(
      rest, probes, micro, share, key
    )
    # Still of the scaled loss: in float16, others might be zero.
    reads = {}
    if has_rows:
      reads = table_step.table_gradients(config.model, of_probes, sown)
    return loss_scale_lib.divided(grads, scale), metrics, reads

  grads, metrics, reads = over_micro_batches(gradient, batch, num_micro, key)
  square = optimizer_lib.squared_norm(grads)
  norm = jnp.sqrt(square)
  round_by = rounding_key(config, state.step)
  row_state, of_rows, more = None, None, {}
  if elsewhere is not None and has_rows:
    of_rows, norm, more = table_step.row_gradients(config, reads, square, scale)
  if tables is not None:
    tables, row_state, norm, more = table_step.update_tables(
      config,
      tables,
      state_of(state.opt_state, optimizer_lib.VALUES),
      reads,
      square,
      round_by,
      scale,
    )
  clipping = clip_scale(norm, config.optimizer.clip_norm)
  updates, opt_state = optimizer_of(config).update(
    scaled(grads, clipping), state.opt_state, rest
  )
  new_rest = apply_updates(rest, updates, round_by)
  steps_taken = state.step
  if scale is not None:
    is_finite = jnp.isfinite(norm)
    new_rest, opt_state = loss_scale_lib.only_if(
      is_finite, (new_rest, opt_state), (rest, state.opt_state)
    )
    steps_taken -= scale.num_overflows
    more['loss_scale'] = scale.scale
    scale = loss_scale_lib.after(scale, is_finite)
    more['overflows'] = scale.num_overflows
  params = new_rest
  if tables is not None:
    params = merged(new_rest, tables)
    opt_state = with_state(opt_state, optimizer_lib.VALUES, row_state)
  metrics |= _rates(config, steps_taken) | more | {'grad_norm': norm}
  state = TrainState(state.step + 1, params, opt_state, scale)
  return state, metrics, of_rows


def finalize(config: Config, state: TrainState) -> TrainState:
  """The state with what its optimizer has left for later, without `frozen`.

  To validate and to export.
  """
  params, opt_state = optimizer_of(config).finalize(
    state.params, state.opt_state
  )
  return dataclasses.replace(state, params=params, opt_state=opt_state)


def optimizer_of(config: Config) -> Optimizer:
  """The optimizer of a run."""
  memory = config.model.sized_memory
  scheme = table_scheme(memory, config.model.dtype) if memory else 'columns'
  moe = config.model.moe
  return optimizer_lib.make_optimizer(
    config.optimizer,
    config.train.num_steps,
    scheme,
    moe.bias_update_rate if moe else 0.0,
  )


def _rates(config: Config, step: jax.Array) -> Metrics:
  by_name = {
    'learning_rate': schedules.learning_rate,
    'value_learning_rate': schedules.value_learning_rate,
  }
  if config.model.memory is None:
    del by_name['value_learning_rate']
  return {
    name: schedule(config.optimizer, config.train.num_steps)(step)
    for name, schedule in by_name.items()
  }
