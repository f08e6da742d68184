# SPDX-License-Identifier: Apache-2.0
"""The rows that tables in files begin with, and the state beside them.

They are written by slices: drawn, the same numbers as in memory, or those that
another checkpoint has.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import mesh
from jaxsparse.config import Config
from jaxsparse.nn import added_parts
from jaxsparse.nn.memory.init import table_parameters
from jaxsparse.nn.memory.tables import KEYS
from jaxsparse.nn.transformer import Transformer
from jaxsparse.ops.memory.sliced_draw import draw_rows, place_of
from jaxsparse.run import table_leaves
from jaxsparse.run.row_store import RowStore
from jaxsparse.training.fetched_rows import row_leaves
from jaxsparse.training.optimizers.finalizing import Optimizer

# Of rows that are made at once.
CHUNK_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Given:
  """Tables that a run begins with and another trained.

  Attributes:
    rows: by a table's path what reads its rows [M, W]; one is read at a time.
    is_extended: whether those that are missing are new parts of the other
      model (`added_parts`), and not the first draw of a run.
  """

  rows: Mapping[str, Callable[[], np.ndarray]]
  is_extended: bool = False


# All tables of a new run.
DRAWN = Given({})


def first_variables(config: Config, key: jax.Array | None = None) -> Any:
  """What the model's `init` gives, and the keys that tables are drawn with."""
  tokens = jnp.zeros((mesh.num_token_shards(), 1), jnp.int32)
  tokens = mesh.reshard(tokens, mesh.act('BT'))
  return Transformer(config.model).init(
    jax.random.key(config.train.seed) if key is None else key,
    tokens,
    tokens,
    tokens,
    mutable=['params', KEYS],
  )


def table_keys(config: Config, given: Given) -> dict[str, np.ndarray]:
  """The keys by which tables are drawn, by their paths."""

  def keys():
    key = added_parts.drawing_key(config.train.seed)
    variables = first_variables(config, key if given.is_extended else None)
    return table_leaves.split(variables[KEYS])[1]

  return jax.tree.map(np.asarray, jax.jit(keys)())


def draw_of(config: Config, given: Given, path: str) -> Callable | None:
  """What draws the rows of a table; None if they are zeros."""
  model, name = config.model, path.rpartition('/')[2]
  memory = model.memory
  if name == 'value_table':
    is_silent = given.is_extended and not memory.output_map
    if memory.table.init == 'zeros' or is_silent:
      return None
  declared = table_parameters(
    memory, model.model_dim, model.num_layers, 'columns'
  )
  return declared[name][0]


def fill(
  store: RowStore,
  optimizer: Optimizer,
  path: str,
  table: jax.ShapeDtypeStruct,
  chunk: Callable[[int, int], Any],
  most_bytes: int,
) -> None:
  """Writes a table and the first state of its rows.

  Args:
    store: new.
    optimizer: by rows.
    path: of the table.
    table: its shape and type.
    chunk: of the first row and how many: these rows, or fewer at the end.
    most_bytes: see `RowStore.limit_memory`.
  """
  num_rows, width = table.shape
  size = max(1, min(num_rows, CHUNK_BYTES // (4 * width)))

  @jax.jit
  def with_state(rows):
    rows = rows.astype(table.dtype)
    return {path: rows} | dict(row_leaves(optimizer.init({path: rows}), path))

  for first in range(0, num_rows, size):
    for name, rows in with_state(chunk(first, size)).items():
      rows = np.asarray(rows)[: num_rows - first]
      if rows.any():
        store.fill(name, first, rows)
    store.limit_memory(most_bytes)


def drawing(
  draw: Callable, key: np.ndarray, width: int
) -> Callable[[int, int], jax.Array]:
  """A chunk of `fill` that draws rows."""

  @jax.jit(static_argnums=1)
  def chunk(place, size):
    return draw_rows(draw, jnp.asarray(key), place, (size, width))

  return lambda first, size: chunk(place_of(first * width), size)


def reading(rows: np.ndarray) -> Callable[[int, int], np.ndarray]:
  """A chunk of `fill` that takes rows which are there."""
  return lambda first, size: rows[first : first + size]
