# SPDX-License-Identifier: Apache-2.0
"""Updates of some rows of a table, beside updates of whole arrays.

An optimizer step on a table whose gradient is a `RowGradient` ends in a
`RowGradient` too: what to add to which rows. Here these are applied, rounded
to narrow tables without losing what is too small for them, and measured.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxsparse import mesh
from jaxsparse.mesh import guest
from jaxsparse.ops.memory.row_gradient import RowGradient
from jaxsparse.ops.memory.table_exchange import TableExchange
from jaxsparse.training.optimizers.each_device import by_parts, is_row_gradient
from jaxsparse.training.optimizers.finalizing import (
  Optimizer,
  as_optimizer,
  unchanged,
)

# Whether XLA's scatter on a CPU takes a whole narrow array to f32 and back.
_WIDENS_SCATTERS = jax.__version_info__ < (0, 12)

# Rows are distinct and ascending, and the unused entries past the table.
_SCATTER = dict(mode='drop', unique_indices=True, indices_are_sorted=True)


def take_rows(array: Array, rows: RowGradient) -> Array:
  """Rows [U, ...] of a table or of its state; zero in unused entries."""
  return array.at[rows.slot].get(
    mode='fill', fill_value=0, unique_indices=True, indices_are_sorted=True
  )


def set_rows(array: Array, rows: RowGradient, value: Array) -> Array:
  """`array` with these rows replaced, in place where it is donated."""
  value = value.astype(array.dtype)
  if array.dtype.itemsize >= 4 or not _WIDENS_SCATTERS:
    return _scatter_rows(array, rows.slot, value)
  return jax.lax.platform_dependent(
    array, rows.slot, value, cpu=_select_rows, default=_scatter_rows
  )


def _scatter_rows(array, slot, value):
  return array.at[slot].set(value, **_SCATTER)


def _select_rows(array, slot, value):
  """`_scatter_rows` by one pass over `array`, which needs no other room."""
  number = jnp.arange(len(slot), dtype=jnp.int32)
  source = jnp.full(len(array), -1, jnp.int32).at[slot].set(number, **_SCATTER)

  def select(array):
    new = value.at[jnp.maximum(source, 0)].get(mode='promise_in_bounds')
    is_new = jnp.expand_dims(source >= 0, range(1, array.ndim))
    return jnp.where(is_new, new, array)

  # In a branch, or XLA would make `value` in the pass, of rows that the pass
  # overwrites, and keep a copy of them all.
  is_any = jnp.any(source >= 0)
  return jax.lax.cond(is_any, select, lambda array: array, array)


def squared_norm(gradients: optax.Updates) -> Float[Array, '']:
  """Sum of squares of arrays and `RowGradient`s, in f32.

  Rows held by other devices are up to the caller.
  """
  leaves = jax.tree.leaves(gradients, is_leaf=is_row_gradient)
  arrays = (x.value if is_row_gradient(x) else x for x in leaves)
  return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in arrays)


def global_norm(gradients: optax.Updates) -> Float[Array, '']:
  """The norm of all, of arrays and `RowGradient`s, in f32."""
  return jnp.sqrt(squared_norm(gradients))


def clip_scale(norm: jax.Array, max_norm: float) -> jax.Array:
  """Factor that brings a gradient's norm to at most `max_norm`; 0: no limit."""
  return _down_to(norm, max_norm) if max_norm else jnp.ones_like(norm)


def _down_to(norm, max_norm):
  return jnp.minimum(1.0, max_norm / jnp.maximum(norm, max_norm))


def scaled(gradients: optax.Updates, scale: Float[Array, '']) -> optax.Updates:
  """Arrays and `RowGradient`s times a scalar, in their types."""

  def times(x):
    if is_row_gradient(x):
      return dataclasses.replace(x, value=x.value * scale)
    return (x * scale).astype(x.dtype)

  return jax.tree.map(times, gradients, is_leaf=is_row_gradient)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
  """`optax.clip_by_global_norm` that also takes `RowGradient`s."""

  def update(gradients, state, params=None):
    del params
    scale = _down_to(global_norm(gradients), max_norm)
    return scaled(gradients, scale), state

  return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def apply_updates(
  params: optax.Params,
  updates: optax.Updates,
  rounding_key: jax.Array | None = None,
  origin: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] = (0, 0),
) -> optax.Params:
  """`optax.apply_updates` that also takes updates of some rows.

  Sums are in f32 or what the parameter is wider. With a key, sums that become
  bf16 parameters are rounded up or down at random, and their mean is the sum:
  updates far below a bf16 parameter's resolution then still move it. Without,
  they are rounded to the nearest. A sum that bf16 can represent is never
  changed.

  Args:
    params: arrays, changed in place where they are donated.
    updates: of every array, or `RowGradient`s.
    rounding_key: a new one every step. The random bits of an element depend on
      the key and its place in the array, so a run is the same on every mesh.
    origin: inside `jax.shard_map`, where the arrays are parts of larger ones:
      row of their first element, and how many such parts are left of them.
  """
  leaves, structure = jax.tree.flatten(updates, is_leaf=is_row_gradient)
  # Masked leaves of `updates` have no place; a None among params must match.
  old = structure.flatten_up_to(params)
  new = []
  for i, (param, update) in enumerate(zip(old, leaves, strict=True)):
    key = None if rounding_key is None else leaf_key(rounding_key, i)
    new.append(_apply(param, update, key, origin))
  return jax.tree.unflatten(structure, new)


def leaf_key(rounding_key: jax.Array, number: int) -> jax.Array:
  """The key by which the leaf of that number is rounded."""
  return jax.random.fold_in(rounding_key, number)


def _apply(param, update, key, origin):
  if not is_row_gradient(update):
    total = jnp.asarray(param + update)
    row = jnp.arange(param.shape[0] if param.ndim else 1)
    return _round(total, param.dtype, key, row, origin)
  if update.layout and guest.free_axes():
    return _apply_to_parts(param, update, key)
  rows = updated_rows(take_rows(param, update), update, key, origin)
  return set_rows(param, update, rows)


def updated_rows(
  rows: Array,
  update: RowGradient,
  rounding_key: jax.Array | None = None,
  origin: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] = (0, 0),
) -> Array:
  """What `apply_updates` makes of the rows [U, W] of a table.

  Args:
    rows: those that `update` is of, in its order.
    update: what to add to them.
    rounding_key: of this table.
    origin: of the part of a table.
  """
  total = rows.astype(update.value.dtype) + update.value
  return _round(total, rows.dtype, rounding_key, update.slot, origin)


def _apply_to_parts(param, update, key):
  """`_apply` of a table that a mesh cuts, by each device for its part."""
  layout = update.layout
  exchange = TableExchange(layout, guest.free_axes(), len(param))

  def on_device(param, slot, value, key):
    origin = (exchange.first_row(), exchange.column_part())
    return _apply(param, RowGradient(slot, value), key, origin)

  specs = (layout.spec, jax.P(layout.rows or None), layout.spec)
  specs += (None if key is None else jax.P(),)
  run = guest.over_free_axes(on_device, specs, layout.spec, check_vma=False)
  return run(param, update.slot, update.value, key)


class MasterState(NamedTuple):
  """State of `with_float32_master`."""

  master: optax.Params
  inner: optax.OptState


def with_float32_master(
  inner: optax.GradientTransformation,
) -> Optimizer:
  """Lets `inner` work on an f32 copy of bf16 parameters, and f32 gradients.

  The copy is kept in the state, like the parameters in shape. The updates
  bring the parameters to the copy, rounded to the nearest: apply them without
  a rounding key.
  """
  inner = as_optimizer(inner)

  def init(params):
    # Without a barrier XLA may skip the rounding to bf16 and back, or not.
    master = _to_float32(jax.lax.optimization_barrier(params))
    return MasterState(master, inner.init(master))

  @by_parts
  def update(grads, state, params=None, **extra):
    updates, inner_state = inner.update(
      _to_float32(grads), state.inner, state.master, **extra
    )
    master = apply_updates(state.master, updates)

    def difference(update, new, param):
      if not is_row_gradient(update):
        return _rounded_difference(new, param)
      rows = take_rows(param, update)
      value = _rounded_difference(take_rows(new, update), rows)
      return dataclasses.replace(update, value=value)

    updates = jax.tree.map(
      difference, updates, master, params, is_leaf=is_row_gradient
    )
    return updates, MasterState(master, inner_state)

  def finalize(params, state):
    master, inner_state = inner.finalize(state.master, state.inner)
    params = jax.tree.map(lambda p, m: m.astype(p.dtype), params, master)
    return params, MasterState(master, inner_state)

  return Optimizer(init, update, unchanged if inner.is_final else finalize)


def in_float32(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Shows `inner` parameters and gradients in f32, so its state is in f32 too.

  For optax's transformations on bf16 parameters without a master. Those of
  `row_optimizers` have f32 states anyway.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params):
    return inner.init(_to_float32(params))

  def update(grads, state, params=None, **extra):
    params = None if params is None else _to_float32(params)
    return inner.update(_to_float32(grads), state, params, **extra)

  return optax.GradientTransformationExtraArgs(init, update)


def _to_float32(tree):
  def cast(x):
    is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if is_narrow else x

  return jax.tree.map(cast, tree)


def _rounded_difference(new, old):
  rounded = new.astype(old.dtype).astype(new.dtype)
  return rounded - old.astype(new.dtype)


def _round(x, dtype, key, row, origin):
  if key is None or dtype != jnp.bfloat16 or x.dtype != jnp.float32:
    return x.astype(dtype)
  first_column = origin[1] * math.prod(x.shape[1:])
  bits = _random_bits(key, row + origin[0], first_column, x.shape)
  return round_stochastically(x, mesh.reshard(bits, mesh.spec_of(x)))


def round_stochastically(
  x: Float[Array, '*S'], bits: jax.Array
) -> Float[Array, '*S']:
  """Rounds f32 to bf16, away from zero with the probability that it leaves.

  A bf16 number is the upper half of an f32 word, so adding uniform 16-bit
  integers to the word and dropping its lower half does it (arXiv:2010.06192).

  Args:
    x: f32.
    bits: uint32, uniform below 2^16.
  """
  word = jax.lax.bitcast_convert_type(x, jnp.uint32)
  word = (word + bits) & jnp.uint32(0xFFFF0000)
  rounded = jax.lax.bitcast_convert_type(word, jnp.float32)
  # A sum would turn some NaNs into infinities and others into zeros.
  return jnp.where(jnp.isfinite(x), rounded, x).astype(jnp.bfloat16)


def _random_bits(key, row, first_column, shape):
  """16 random bits an element, a hash of the key and the element's place.

  Ten times cheaper than the generator's, which matters as it is called for
  every element of the update.
  """
  first, second = jax.random.bits(key, (2,), jnp.uint32)
  row_hash = _mix(_mix(row.astype(jnp.uint32) ^ first) ^ second)
  num_columns = math.prod(shape[1:])
  # An odd constant: no two columns of a row share a counter.
  column = jnp.arange(num_columns, dtype=jnp.uint32)
  column += jnp.asarray(first_column, jnp.uint32)
  column *= jnp.uint32(0x9E3779B9)
  return (_mix(row_hash[:, None] + column[None]) >> 16).reshape(shape)


def _mix(x):
  """The 32-bit finalizer of MurmurHash3 (public domain)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
