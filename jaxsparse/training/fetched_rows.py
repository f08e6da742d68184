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

from jaxsparse.config import Config
from jaxsparse.ops.memory.row_gradient import RowGradient
from jaxsparse.run.row_store import RowStore
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


class TakenRows:
  """Rows of a table and of its state, taken from their files."""

  def __init__(self):
    # By leaf and size.
    self._buffers: dict[tuple[str, int], np.ndarray] = {}

  def __call__(
    self, store: RowStore, path: str, ids: np.ndarray, size: int
  ) -> dict[str, np.ndarray]:
    """Rows by their leaves, with room for more rows after them.

    The arrays are the same at the next call of that size.

    Args:
      store: of the files.
      path: of the table.
      ids: numbers of the rows.
      size: of each array, as many or more.
    """
    taken = {}
    for name, leaf in store.leaves.items():
      if name.partition('.')[0] != path:
        continue
      rows = store.files[name].rows
      if (name, size) not in self._buffers:
        shape = (size, *leaf.shape[1:])
        self._buffers[name, size] = np.zeros(shape, rows.dtype)
      taken[name] = self._buffers[name, size]
      np.take(rows, ids, axis=0, out=taken[name][: len(ids)], mode='clip')
    return taken


def update_rows(
  config: Config,
  optimizer: Optimizer,
  template: Any,
  sizes: tuple[int, ...],
  gradients: dict[str, RowGradient],
  old: dict[str, dict[str, jax.Array]],
  scalars: list[jax.Array],
  count: jax.Array,
  step: jax.Array,
) -> tuple[dict, list[jax.Array]]:
  """One step of the optimizer; what it is of unused entries has no meaning.

  Args:
    config: of the run.
    optimizer: by rows.
    template: its state of whole tables, abstract.
    sizes: of each table, how many of the gradient's first rows are taken.
    gradients: by table, clipped.
    old: by table its rows and those of its state, by their names, as many.
    scalars: of the state, in the order of its leaves.
    count: steps of this optimizer before this one, of which the scalars may
      know already by other rows.
    step: optimizer steps before this one.

  Returns:
    By table the new rows by their names, and the new scalars.
  """
  rows = {name: x for of in old.values() for name, x in of.items()}
  state = filled(template, rows, scalars)
  tables, local = {}, {}
  for size, (path, gradient) in zip(sizes, gradients.items(), strict=True):
    tables[path] = rows[path]
    place = jnp.arange(size, dtype=jnp.int32)
    local[path] = RowGradient(place, gradient.value[:size])
  updates, state = optimizer.update(local, state, tables, step=count)
  key = rounding_key(config, step)
  new = {}
  for i, (path, update) in enumerate(updates.items()):
    slot = gradients[path].slot[: len(update.value)]
    of_table = RowGradient(slot, update.value)
    own = None if key is None else leaf_key(key, i)
    new[path] = {path: updated_rows(rows[path], of_table, own)}
    new[path] |= dict(row_leaves(state, path))
  left = [x for p, x in jax.tree.leaves_with_path(state) if not _is_by_row(p)]
  return new, left


def finalized_rows(
  optimizer: Optimizer, template: Any, path: str, old: dict, scalars: list
) -> dict[str, jax.Array]:
  """Rows of a table and of its state with all their steps done."""
  of_state = filled(template, old, scalars)
  tables, of_state = optimizer.finalize({path: old[path]}, of_state)
  return {path: tables[path]} | dict(row_leaves(of_state, path))


def touched_leaf(state: Any, path: str) -> str:
  """Of row Adam, which alone leaves steps for later: what says since when."""
  names = (name for name, _ in row_leaves(state, path))
  return next(name for name in names if name.endswith('.touched'))


def _is_by_row(place: tuple) -> bool:
  return any(isinstance(p, jax.tree_util.DictKey) for p in place)


def collected(
  gradient: RowGradient, num_rows: int, num_pieces: int
) -> tuple[np.ndarray, int, RowGradient]:
  """The numbers of the rows of a gradient, and it by one device.

  Args:
    gradient: of a table, or the parts of its pieces one after another.
    num_rows: of the table.
    num_pieces: into which a mesh cuts the rows.

  Returns:
    The numbers int64, ascending; how many rows to compute with; and the
    gradient, of at least as many.
  """
  slot = np.asarray(gradient.slot)
  if len(gradient.value.sharding.device_set) == 1:
    ids = slot[: np.searchsorted(slot, num_rows)].astype(np.int64)
    return ids, _rounded_up(len(slot), len(ids)), gradient
  num_own = num_rows // num_pieces
  parts, values = [], []
  for piece, (slots, value) in enumerate(
    zip(
      np.split(slot, num_pieces),
      np.split(np.asarray(gradient.value), num_pieces),
      strict=True,
    )
  ):
    num_used = np.searchsorted(slots, num_own)
    parts.append(slots[:num_used].astype(np.int64) + piece * num_own)
    values.append(value[:num_used])
  ids = np.concatenate(parts)
  size = _rounded_up(len(slot), len(ids))
  # Unused entries lie beyond the table.
  slot = np.arange(num_rows, num_rows + size, dtype=slot.dtype)
  slot[: len(ids)] = ids
  value = np.zeros((size, *value.shape[1:]), value.dtype)
  value[: len(ids)] = np.concatenate(values)
  return ids, size, RowGradient(jnp.asarray(slot), jnp.asarray(value))


def _rounded_up(size: int, num_rows: int) -> int:
  """Rows to compute with: few numbers, as each is compiled for."""
  while size >= 2 * max(num_rows, 64):
    size = -(-size // 2)
  return size
