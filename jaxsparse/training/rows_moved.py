# SPDX-License-Identifier: Apache-2.0
"""How many rows of value tables a run has moved since it began."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxsparse.config import Config
from jaxsparse.config.errors import UserError
from jaxsparse.run import checkpoint, start, table_leaves
from jaxsparse.training import start_from, trained_part

# Of a row's norm: what moved less than that is as it was.
LEAST = 0.01


def since_start(
  config: Config,
  params: dict,
  begun_from: start.Start | None,
  say: Callable[[str], None],
  read: start_from.Read = checkpoint.load_params,
) -> dict[str, float]:
  """The share of rows that moved, of each table that the run trained.

  Args:
    config: of the run.
    params: at its end, on the mesh in use.
    begun_from: what it began with; None if it was drawn.
    say: gets a sentence if that can't be read any more.
    read: reads a checkpoint, as `start_from.load_params` has it.

  Returns:
    Shares by metrics' names, such as 'block_01/memory/rows_moved'; none of
    tables on file, which nothing reads whole.
  """
  trained, _ = trained_part.split(config.optimizer, params)
  _, tables = table_leaves.split(trained)
  # An adapter's table is none of the run's own.
  tables = {p: x for p, x in tables.items() if isinstance(x, jax.Array)}
  is_on_file = config.model.has_tables_on_file
  if begun_from is None or not tables or is_on_file or config.adapter.kind:
    return {}
  try:
    first = start_from.load_params(config, begun_from, say, read)
  except UserError as error:
    say(f'How many rows of tables moved is not known, as {error}')
    return {}
  _, before = table_leaves.split(first)
  moved = jax.jit(share)
  return {
    _name(path): float(moved(before[path], table))
    for path, table in tables.items()
  }


def share(before: jax.Array, after: jax.Array) -> jax.Array:
  """Of the rows, those whose change is more than `LEAST` of their norm.

  Args:
    before: [M, W].
    after: [M, W].
  """
  before, after = (x.astype(jnp.float32) for x in (before, after))
  norms = jnp.linalg.norm(before, axis=-1)
  changes = jnp.linalg.norm(after - before, axis=-1)
  return jnp.mean(changes > LEAST * norms)


def _name(path: str) -> str:
  """Of a metric: 'block_01/memory/rows_moved' of the values there."""
  layer, _, leaf = path.rpartition('/')
  kind = leaf.removesuffix('value_table')
  return f'{layer}/{kind}rows_moved'
