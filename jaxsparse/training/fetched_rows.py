# SPDX-License-Identifier: Apache-2.0
"""The step of a row optimizer on rows that were fetched for it.

To the optimizer they are a small table whose rows all have a gradient. The
arrays of its state are known by their places: those that have a row for each of
the table's stand under the table's path, the others are scalars.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse.config import Config
from jaxsparse.ops.memory.row_gradient import RowGradient
from jaxsparse.run.row_hashes import row_hash_changes
from jaxsparse.training.optimizers.finalizing import Optimizer
from jaxsparse.training.optimizers.row_updates import leaf_key, updated_rows
from jaxsparse.training.step import rounding_key


def row_leaves(state: Any, path: str) -> list[tuple[str, Any]]:
  """The arrays by rows of one table in an optimizer's state, by their names."""
  found = []
  for place, leaf in jax.tree.leaves_with_path(state):
    parts = [p.name for p in place if isinstance(p, jax.tree_util.GetAttrKey)]
    if any(getattr(p, 'key', None) == path for p in place):
      found.append((f'{path}.{".".join(parts)}', leaf))
  return found


def filled(template: Any, rows: dict[str, Any], scalars: list) -> Any:
  """The optimizer's state of some rows: theirs, and scalars in their order."""
  left = iter(scalars)

  def value(place, _):
    keys = [p.key for p in place if isinstance(p, jax.tree_util.DictKey)]
    if not keys:
      return next(left)
    parts = [p.name for p in place if isinstance(p, jax.tree_util.GetAttrKey)]
    return rows.get(f'{keys[0]}.{".".join(parts)}')

  return jax.tree.map_with_path(value, template)


def update_rows(
  config: Config,
  optimizer: Optimizer,
  template: Any,
  sizes: tuple[int, ...],
  gradients: dict[str, RowGradient],
  old: dict[str, dict[str, jax.Array]],
  scalars: list[jax.Array],
  step: jax.Array,
) -> tuple[dict, dict, list[jax.Array]]:
  """One step of the optimizer; what it is of unused entries has no meaning.

  Args:
    config: of the run.
    optimizer: by rows.
    template: its state of whole tables, abstract.
    sizes: of each table, how many of the gradient's first rows are taken.
    gradients: by table, clipped.
    old: by table its rows and those of its state, by their names, as many.
    scalars: of the state, in the order of its leaves.
    step: optimizer steps before this one.

  Returns:
    By table the new rows by their names, the changes of their hashes, and the
    new scalars.
  """
  rows = {name: x for of in old.values() for name, x in of.items()}
  state = filled(template, rows, scalars)
  tables, local = {}, {}
  for size, (path, gradient) in zip(sizes, gradients.items(), strict=True):
    tables[path] = rows[path]
    place = jnp.arange(size, dtype=jnp.int32)
    local[path] = RowGradient(place, gradient.value[:size])
  count = optax.tree_utils.tree_get(state, 'count')
  updates, state = optimizer.update(local, state, tables, step=count)
  key = rounding_key(config, step)
  new, changes = {}, {}
  for i, (path, update) in enumerate(updates.items()):
    slot = gradients[path].slot[: len(update.slot)]
    of_table = RowGradient(slot, update.value)
    own = None if key is None else leaf_key(key, i)
    new[path] = {path: updated_rows(rows[path], of_table, own)}
    new[path] |= dict(row_leaves(state, path))
    number = slot.astype(jnp.uint32)
    changes[path] = hash_changes(new[path], old[path], number)
  left = [x for p, x in jax.tree.leaves_with_path(state) if not _is_by_row(p)]
  return new, changes, left


def _is_by_row(place: tuple) -> bool:
  return any(isinstance(p, jax.tree_util.DictKey) for p in place)


def hash_changes(
  new: dict[str, jax.Array], old: dict[str, jax.Array], number: jax.Array
) -> dict[str, jax.Array]:
  """`row_hash_changes` of each leaf."""
  return {
    name: row_hash_changes(x, old[name], number) for name, x in new.items()
  }


def rounded_up(slot: np.ndarray, ids: np.ndarray) -> int:
  """Rows to compute with: few numbers, as each is compiled for."""
  size = len(slot)
  while size >= 2 * max(len(ids), 64):
    size = -(-size // 2)
  return size
