# SPDX-License-Identifier: Apache-2.0
"""Optimizers whose cost follows the rows touched and not the rows held.

They are optax transformations whose gradients are `RowGradient`s, one for each
table, and whose updates are too, with the `finalize` of `finalizing`:

  optimizer = row_optimizers.row_adam(1e-3)
  state = optimizer.init({'table': table})
  updates, state = optimizer.update({'table': row_gradient}, state, params)
  params = row_updates.apply_updates(params, updates)

State arrays are [M, W] or [M] for a table [M, W], to be split over devices as
the table and its rows are, and scalars. They are changed in place by scatters
of the rows, so donate them. Every device works on its part of the table, inside
a `jax.shard_map` of the caller or, where a gradient says how a mesh cuts its
table, inside one of their own; nothing is communicated, but by `row_adagrad`.

The rows of one step may come in several calls, each with other rows, if every
one is given `step`, the number of optimizer steps before this one; each step
then needs a call at least, be it without rows.

They stand in `optax.partition` beside any others. Give it the labels as a tree:
a function of the gradients would meet `RowGradient`s where the parameters are
arrays. Optax's own
transformations do not understand a `RowGradient` and change its slots.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxsparse.config.errors import require
from jaxsparse.training.optimizers.each_device import (
  by_parts,
  on_each_device,
  specs_of,
)
from jaxsparse.training.optimizers.finalizing import Optimizer, unchanged
from jaxsparse.training.optimizers.lazy_adam_catchup import MissedSteps
from jaxsparse.training.optimizers.row_updates import (
  is_row_gradient,
  set_rows,
  take_rows,
)


class RowAdamState(NamedTuple):
  """State of `row_adam`; each tree has the parameters' structure.

  Attributes:
    count: optimizer steps so far.
    mu: first moments [M, W], f32, as of the row's last step.
    nu: second moments [M, W], f32, as of the row's last step.
    touched: per row [M], the last step that touched it, from 1 on; without
      catch-up how many steps have.
    log_decay: running sum of log(1 - rate * weight_decay), and what rounding
      has left of it; None without weight decay or catch-up.
    row_log_decay: per row [M], the sum at its last step; None likewise.
  """

  count: Int[Array, '']
  mu: optax.Params
  nu: optax.Params
  touched: optax.Params
  log_decay: tuple[jax.Array, jax.Array] | None
  row_log_decay: optax.Params | None


def row_adam(
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  epsilon: float = 1e-8,
  weight_decay: float = 0.0,
  catch_up: bool = True,
) -> Optimizer:
  """AdamW on the touched rows of tables.

  With `catch_up` the semantics are those of dense AdamW (`optax.adamw`, with
  its global bias correction), for which an absent row has a zero gradient. All
  that dense AdamW does to a row in its absence is done at its return, before
  its new gradient counts: both moments decay, so do the parameters, and they
  take the steps that the old momentum still causes. So a row is only brought
  up to date after the forward pass that returns to it has read it, and that
  pass reads it as its last step left it. `finalize` gives all rows as they
  should be: validate and export with it.

  How close it comes: rounding aside, moments and decay are exact, and the
  missed steps are exact up to an absence of 1024 steps where epsilon is small
  beside the second moment's root; `lazy_adam_catchup` says what is approximate.

  Without `catch_up`, lazy Adam: an absent row stands still, moments included;
  its bias correction counts its own steps; and it decays only when touched.
  This is another optimizer than Adam, with longer memory for rarer rows.

  Args:
    learning_rate: constant, or schedule of the number of steps before.
    b1: decay of the first moment.
    b2: decay of the second; catch_up needs b1^2 < b2, without which absent
      rows would drift off ever faster.
    epsilon: added to the root of the corrected second moment.
    weight_decay: decoupled, times the rate, for every value of a table.
    catch_up: whether absent rows get what they miss.

  Raises:
    UserError: a value is out of its range.
  """
  require(0 <= b1 < 1, f'b1 must be within 0 and below 1, got {b1}.')
  require(0 < b2 < 1, f'b2 must be between 0 and 1, got {b2}.')
  require(epsilon > 0, f'epsilon must be positive, got {epsilon}.')
  require(
    weight_decay >= 0, f'weight_decay must not be negative, got {weight_decay}.'
  )
  require(
    not catch_up or b1 * b1 < b2,
    f'b1 must be below the root of b2 = {b2} for catch_up, got {b1}.',
  )
  keeps_decay = catch_up and weight_decay > 0
  missed = MissedSteps(learning_rate, b1, b2, epsilon, weight_decay)

  def init(params):
    # Two arrays, as none may be donated twice.
    log_decay = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)
    return RowAdamState(
      count=jnp.zeros((), jnp.int32),
      mu=jax.tree.map(_zeros, params),
      nu=jax.tree.map(_zeros, params),
      touched=jax.tree.map(lambda p: _row_zeros(p, jnp.int32), params),
      log_decay=log_decay if keeps_decay else None,
      row_log_decay=jax.tree.map(_row_zeros, params) if keeps_decay else None,
    )

  @by_parts
  def update(grads, state, params=None, *, step=None, **extra):
    del extra
    require(params is not None, 'params must be given to row_adam, got None.')
    step = state.count if step is None else jnp.asarray(step, jnp.int32)
    log_decay = _log_decay_before(missed, state, step)
    decay_before = decay_after = None
    if keeps_decay:
      decay_before = sum(log_decay)
      decay_after = decay_before + missed.log_decay(step + 1)
    recent = missed.recent(step) if catch_up else None

    def update_rows(grad, param, mu, nu, touched, row_log_decay):
      value = grad.value.astype(jnp.float32)
      rows = take_rows(param, grad).astype(jnp.float32)
      mu_rows, nu_rows, last = (take_rows(x, grad) for x in (mu, nu, touched))
      shift = 0.0
      now = jnp.maximum(last, step + 1)
      count = step + 1
      if catch_up:
        long_log_decay = None
        if keeps_decay:
          decay_rows = take_rows(row_log_decay, grad)
          long_log_decay = decay_before - decay_rows
          row_log_decay = set_rows(
            row_log_decay, grad, jnp.minimum(decay_rows, decay_after)
          )
        shift, mu_rows, nu_rows = missed.catch_up(
          rows, mu_rows, nu_rows, last, step, recent, long_log_decay
        )
        rows += shift
      else:
        now = last + 1
        count = now[:, None]
      mu_rows = b1 * mu_rows + (1 - b1) * value
      nu_rows = b2 * nu_rows + (1 - b2) * jnp.square(value)
      direction = mu_rows / (1 - b1**count)
      direction /= jnp.sqrt(nu_rows / (1 - b2**count)) + epsilon
      direction += weight_decay * rows
      delta = shift - missed.rate(step + 1) * direction
      # All old rows are read before any is written: else XLA fuses the reading
      # of one array's into the writing of another's, and keeps a copy of it.
      delta, mu_rows, nu_rows = jax.lax.optimization_barrier(
        (delta, mu_rows, nu_rows)
      )
      return (
        dataclasses.replace(grad, value=delta),
        set_rows(mu, grad, mu_rows),
        set_rows(nu, grad, nu_rows),
        set_rows(touched, grad, now),
        row_log_decay,
      )

    updates, *trees = _map_rows(
      update_rows, grads, params, state.mu, state.nu, state.touched,
      state.row_log_decay,
    )  # fmt: skip
    if not keeps_decay:
      trees[-1] = None
    mu, nu, touched, row_log_decay = trees
    return updates, RowAdamState(
      step + 1, mu, nu, touched, log_decay, row_log_decay
    )

  if not catch_up:
    return Optimizer(init, update, unchanged)
  bring = functools.partial(
    materialize,
    learning_rate=learning_rate,
    b1=b1,
    b2=b2,
    epsilon=epsilon,
    weight_decay=weight_decay,
  )

  def finalize(params, state):
    return on_each_device(bring, specs_of((params, state)))(params, state)

  return Optimizer(init, update, finalize)


def materialize(
  params: optax.Params,
  state: RowAdamState,
  learning_rate: optax.ScalarOrSchedule,
  b1: float = 0.9,
  b2: float = 0.999,
  epsilon: float = 1e-8,
  weight_decay: float = 0.0,
) -> tuple[optax.Params, RowAdamState]:
  """Parameters and state where dense AdamW would have them, all rows included.

  The `finalize` of `row_adam`: one pass over the tables, for validation and
  export.

  Args:
    params: the tables. Leaves that the state masks are returned as they are.
    state: of `row_adam` with catch-up.
    learning_rate: this and the others as they were given to `row_adam`.
  """
  missed = MissedSteps(learning_rate, b1, b2, epsilon, weight_decay)
  step = state.count
  recent = missed.recent(step)
  log_decay = _log_decay_before(missed, state, step)

  def bring(mu, param, nu, touched, row_log_decay):
    if isinstance(mu, optax.MaskedNode):
      return param, mu, nu, touched, row_log_decay
    long_log_decay = None
    if row_log_decay is not None:
      long_log_decay = sum(log_decay) - row_log_decay
      row_log_decay = row_log_decay + long_log_decay
    rows = param.astype(jnp.float32)
    shift, mu, nu = missed.catch_up(
      rows, mu, nu, touched, step, recent, long_log_decay
    )
    rows = (rows + shift).astype(param.dtype)
    return rows, mu, nu, jnp.full_like(touched, step), row_log_decay

  leaves, structure = jax.tree.flatten(
    state.mu, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
  )
  trees = (params, state.nu, state.touched, state.row_log_decay)
  others = [
    [None] * len(leaves) if tree is None else structure.flatten_up_to(tree)
    for tree in trees
  ]
  columns = zip(*map(bring, leaves, *others), strict=True)
  params, mu, nu, touched, row_log_decay = (
    jax.tree.unflatten(structure, column) for column in columns
  )
  return params, state._replace(
    mu=mu,
    nu=nu,
    touched=touched,
    row_log_decay=None if state.row_log_decay is None else row_log_decay,
  )


class RowAdagradState(NamedTuple):
  """State of `row_adagrad`.

  Attributes:
    count: optimizer steps so far.
    sum_of_squares: per row [M], of the mean square of its gradients.
  """

  count: Int[Array, '']
  sum_of_squares: optax.Params


def row_adagrad(
  learning_rate: optax.ScalarOrSchedule,
  epsilon: float = 1e-8,
  column_axes: Sequence[str] = (),
) -> Optimizer:
  """Adagrad with one rate for each row of tables.

  A row's accumulator grows by the mean of its gradient's squares, and its step
  is the gradient over the accumulator's root. Exact for absent rows, which it
  leaves alone. With one f32 a row, a bf16 table of width W takes 2 + 4 / W
  bytes a value, state included: the leanest setting.

  Args:
    learning_rate: constant, or schedule of the number of steps before.
    epsilon: added to the accumulator's root.
    column_axes: mesh axes that split the table's columns, inside
      `jax.shard_map`; the squares are summed over them.

  Raises:
    UserError: epsilon is not positive.
  """
  require(epsilon > 0, f'epsilon must be positive, got {epsilon}.')
  column_axes = tuple(column_axes)

  def init(params):
    return RowAdagradState(
      jnp.zeros((), jnp.int32), jax.tree.map(_row_zeros, params)
    )

  @by_parts
  def update(grads, state, params=None, *, step=None, **extra):
    del params, extra
    step = state.count if step is None else jnp.asarray(step, jnp.int32)
    is_schedule = callable(learning_rate)
    rate = learning_rate(step) if is_schedule else learning_rate

    def update_rows(grad, sums):
      value = grad.value.astype(jnp.float32)
      squares = jnp.sum(jnp.square(value), axis=1)
      width = value.shape[1]
      axes = grad.layout.columns if grad.layout else column_axes
      if axes:
        squares = jax.lax.psum(squares, axes)
        width *= jax.lax.axis_size(axes)
      sum_rows = take_rows(sums, grad) + squares / width
      delta = -rate * value / (jnp.sqrt(sum_rows)[:, None] + epsilon)
      sums = set_rows(sums, grad, sum_rows)
      return dataclasses.replace(grad, value=delta), sums

    updates, sums = _map_rows(update_rows, grads, state.sum_of_squares)
    return updates, RowAdagradState(step + 1, sums)

  return Optimizer(init, update)


def _map_rows(function, grads, *trees):
  """Maps over gradients and trees like the parameters; a tuple of trees.

  A tree may be None, which gives None for each leaf.
  """
  leaves, structure = jax.tree.flatten(grads, is_leaf=is_row_gradient)
  for leaf in leaves:
    require(
      is_row_gradient(leaf),
      f'grads must hold RowGradients only, got a {type(leaf).__name__}.',
    )
  others = [
    [None] * len(leaves) if tree is None else structure.flatten_up_to(tree)
    for tree in trees
  ]
  results = [function(*args) for args in zip(leaves, *others, strict=True)]
  return tuple(
    jax.tree.unflatten(structure, column)
    for column in zip(*results, strict=True)
  )


def _log_decay_before(missed, state, step):
  """The summed log decay of all steps before the one after `step`.

  With it comes what rounding left of the sum (Kahan's compensation): of 10^6
  terms each may be less than the sum's resolution. Only the first call of a
  step adds to the sum.
  """
  if state.log_decay is None:
    return None
  total, rest = state.log_decay
  term = missed.log_decay(step) + rest
  new_total = total + term
  new = new_total, term - (new_total - total)
  is_first = state.count == step
  return tuple(
    jnp.where(is_first, a, b) for a, b in zip(new, (total, rest), strict=True)
  )


def _zeros(param):
  return jnp.zeros_like(param, dtype=jnp.float32)


def _row_zeros(param, dtype=jnp.float32):
  """Zeros [M], split over devices as the rows of `param` are."""
  zeros = jnp.zeros(param.shape[:1], dtype)
  if jax.sharding.get_abstract_mesh().empty:
    return zeros
  rows = jax.P(*jax.typeof(param).sharding.spec[:1])
  return jax.sharding.reshard(zeros, rows)
