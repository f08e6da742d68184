# SPDX-License-Identifier: Apache-2.0
"""Work that each device does on its part of tables and of their state."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxsparse.config.errors import require
from jaxsparse.mesh import guest
from jaxsparse.mesh.layout import TableLayout
from jaxsparse.ops.memory.row_gradient import RowGradient


def is_row_gradient(x: Any) -> bool:
  """For `is_leaf` of tree functions."""
  return isinstance(x, RowGradient)


def on_each_device(function: Callable, out_specs: Any) -> Callable:
  """`function` by `jax.shard_map` where arrays are known to lie on a mesh.

  Over Explicit axes, as all of our own mesh are; `function` itself elsewhere.
  """
  if jax.sharding.AxisType.Explicit not in guest.axis_types().values():
    return function
  # What devices with copies of a table compute alike is not seen to be alike.
  return jax.shard_map(function, out_specs=out_specs, check_vma=False)


def specs_of(arrays: Any) -> Any:
  """How the arrays of a tree lie on the mesh in use."""
  return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arrays)


def by_parts(update: Callable) -> Callable:
  """An optax `update` of `RowGradient`s that each device does for its rows.

  Where the gradients are those of whole tables that a mesh cuts (`layout`);
  else it is `update` itself. All tables of one call must be cut alike.
  """

  @functools.wraps(update)
  def call(grads, state, params=None, **extra):
    layout = _layout_of(grads)
    if layout is None or not guest.free_axes():
      return update(grads, state, params, **extra)
    leaves, structure = jax.tree.flatten(grads, is_leaf=is_row_gradient)
    pairs = [(g.slot, g.value) for g in leaves]
    pair_specs = [(jax.P(layout.rows or None), layout.spec)] * len(pairs)
    specs = jax.tree.map(
      functools.partial(_spec_of_part, layout), (state, params, extra)
    )

    def on_device(pairs, others):
      state, params, extra = others
      grads = [RowGradient(*pair, layout) for pair in pairs]
      grads = jax.tree.unflatten(structure, grads)
      updates, state = update(grads, state, params, **extra)
      leaves = jax.tree.leaves(updates, is_leaf=is_row_gradient)
      return [(u.slot, u.value) for u in leaves], state

    run = guest.over_free_axes(
      on_device, (pair_specs, specs), (pair_specs, specs[0]), check_vma=False
    )
    pairs, state = run(pairs, (state, params, extra))
    updates = [RowGradient(*pair, layout) for pair in pairs]
    return jax.tree.unflatten(structure, updates), state

  return call


def _spec_of_part(layout: TableLayout, x: jax.Array) -> jax.P:
  """Of a table or its state: by the table, by its rows, or a scalar's."""
  specs = {2: layout.spec, 1: jax.P(layout.rows or None), 0: jax.P()}
  return specs[jax.numpy.ndim(x)]


def _layout_of(grads: Any) -> TableLayout | None:
  leaves = jax.tree.leaves(grads, is_leaf=is_row_gradient)
  layouts = {g.layout for g in leaves if is_row_gradient(g)}
  require(
    len(layouts) < 2,
    'tables of one row optimizer must be cut over the same mesh axes, got '
    f'{len(layouts)} ways: give each its own label in optax.partition.',
  )
  return next(iter(layouts), None)
