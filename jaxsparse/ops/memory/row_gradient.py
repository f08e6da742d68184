# SPDX-License-Identifier: Apache-2.0
"""The gradient of a table by the rows that a step has read.

A value bag (see `value_bag`) pools rows of a table:

  out[t, e, columns i] = sum over j with pool[t, j] = e of
      weight[t, j, i] * table[slot[t, j], columns i]

so slots, pools, weights and the cotangent of `out` are the table's whole
gradient, though no array of the table's size. Here they become the gradient of
each distinct row. The references of a step are sorted by row once; then a
window of as many distinct rows as the caller has memory for is summed, and the
next, until all are done.

Letters: M rows, W their width, T tokens, k references per token, R = T * k,
c cores, E pools, U rows of a window.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.config.errors import require
from jaxsparse.mesh import TableLayout
from jaxsparse.ops.memory.segment_sum import (
  REFERENCES_GPU,
  sum_equal_rows,
  updates_at,
)
from jaxsparse.ops.shard_map_vma import match_vma, sort_key_val

# Bytes of the updates that are formed at once. A GPU forms them in registers,
# and each turn of the loop costs it a wait for the host.
_BLOCK_BYTES = 2**18
_BLOCK_BYTES_GPU = 2**27


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowGradient:
  """A gradient, or an update, of distinct rows of a table; the rest is zero.

  Attributes:
    slot: rows, ascending and distinct. Unused entries come last and lie beyond
      the table, so scatters take `mode='drop', unique_indices=True,
      indices_are_sorted=True`.
    value: of each row; zero in unused entries.
    layout: how the table lies, if it is cut and the gradient is that of the
      whole. The parts of each piece of the rows then stand one after another,
      each counted from its piece's first row, and columns lie as the table's.

  Leading dimensions S are for stacks of them, as `jax.lax.scan` takes apart.
  """

  slot: Int[Array, '*S U']
  value: Float[Array, '*S U W']
  layout: TableLayout | None = dataclasses.field(
    default=None, metadata=dict(static=True)
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class References:
  """One step's references to the rows of a table, sorted by row.

  Attributes:
    row: row of each, ascending; `num_rows` for the rows of other devices.
    position: its place in the flattened slot[T, k], ascending within a row.
    row_position: how many distinct rows come before its own.
    num_distinct: rows that are referenced at all.
    num_rows: M, the rows of this device.
  """

  row: Int[Array, 'R']
  position: Int[Array, 'R']
  row_position: Int[Array, 'R']
  num_distinct: Int[Array, '']
  num_rows: int = dataclasses.field(metadata=dict(static=True))


def sort_references(
  slot: Int[Array, 'T k'], num_rows: int, first_row: Int[Array, ''] | int = 0
) -> References:
  """Sorts the references of a step.

  Args:
    slot: row of each reference.
    num_rows: rows of the table that this device holds.
    first_row: the first of them; references to other rows are left out.
  """
  local = slot.reshape(-1).astype(jnp.int32) - first_row
  local = jnp.where((local >= 0) & (local < num_rows), local, num_rows)
  position = jnp.arange(local.size, dtype=jnp.int32)
  row, position = sort_key_val(local, position)
  before = jnp.concatenate([jnp.full_like(row[:1], -1), row[:-1]])
  is_new = row != before
  row_position = jnp.cumsum(is_new, dtype=jnp.int32) - 1
  num_distinct = jnp.sum(is_new & (row < num_rows), dtype=jnp.int32)
  return References(row, position, row_position, num_distinct, num_rows)


def row_gradient(
  references: References,
  weight: Float[Array, 'T k c'],
  cotangent: Float[Array, 'T E W'],
  pool: Int[Array, 'T k'] | None,
  budget: int,
  first_position: Int[Array, ''] | int = 0,
  *,
  is_deterministic: bool = False,
) -> RowGradient:
  """Sums the gradients of `budget` distinct rows, from `first_position` on.

  Calls with first_position = 0, budget, 2 * budget, ... below `num_distinct`
  give the whole gradient, each row once. Work and memory follow the window: [U,
  W] for the sums and a fixed chunk of references on their way to them.

  Args:
    references: what `sort_references` made of this step's slots.
    weight: c weights of each reference, one for each column block.
    cotangent: gradient of the bags.
    pool: of each reference; None if there is one per token.
    budget: U, the rows of the window.
    first_position: position of the window's first row.
    is_deterministic: add in a fixed order on a GPU too, where atomic additions
      are faster; devices with copies of a table need it to stay alike.

  Returns:
    The gradient in f32 (f64 for f64), rows counted from the device's first.

  Raises:
    UserError: the budget is not positive.
  """
  require(budget > 0, f'budget must be positive, got {budget}.')
  slot = _window_rows(references, budget, first_position)
  dtype = jnp.promote_types(jnp.result_type(weight, cotangent), jnp.float32)
  width = cotangent.shape[-1]
  value = jnp.zeros((budget, width), dtype)
  value, *_ = match_vma(value, slot, weight, cotangent, pool)
  if references.row.size:
    add = functools.partial(
      _add_window, references, weight, cotangent, pool, first_position
    )
    if is_deterministic:
      on_gpu = functools.partial(
        add, _add_once_per_row, REFERENCES_GPU * value[0].nbytes
      )
    else:
      on_gpu = functools.partial(add, _add_equal_rows, _BLOCK_BYTES_GPU)
    value = jax.lax.platform_dependent(
      value,
      cuda=on_gpu,
      rocm=on_gpu,
      default=functools.partial(add, _add_equal_rows, _BLOCK_BYTES),
    )
  return RowGradient(slot, value)


def row_gradient_reference(
  slot: Int[Array, 'T k'],
  weight: Float[Array, 'T k c'],
  cotangent: Float[Array, 'T E W'],
  pool: Int[Array, 'T k'] | None,
  num_rows: int,
) -> Float[Array, '{num_rows} W']:
  """The gradient of the whole table, by forming that of every reference."""
  if pool is None:
    pool = jnp.zeros_like(slot)
  width = cotangent.shape[-1]
  weight_TkW = jnp.repeat(weight, width // weight.shape[-1], axis=-1)
  token_T1 = jnp.arange(slot.shape[0])[:, None]
  update_TkW = weight_TkW * cotangent[token_T1, pool]
  return jnp.zeros((num_rows, width), update_TkW.dtype).at[slot].add(update_TkW)


def _window_rows(
  references: References, budget: int, first_position: Int[Array, ''] | int
):
  """Rows at the window's positions; after the last one, rows past the table."""
  row_position = first_position + jnp.arange(budget, dtype=jnp.int32)
  # Past int32 only if the positions are, which are bounded by the references.
  unused = references.num_rows + jnp.arange(budget, dtype=jnp.int32)
  if not references.row.size:
    return unused
  row_position, known = match_vma(row_position, references.row_position)
  at = jnp.searchsorted(known, row_position)
  row = references.row.at[at].get(mode='clip')
  return jnp.where(row_position < references.num_distinct, row, unused)


def _add_equal_rows(
  value: Float[Array, 'U W'],
  target: Int[Array, 'n'],
  update: Float[Array, 'n W'],
):
  return value.at[target].add(update, mode='drop', indices_are_sorted=True)


def _add_once_per_row(
  value: Float[Array, 'U W'],
  target: Int[Array, 'n'],
  update: Float[Array, 'n W'],
):
  target, update = sum_equal_rows(target, update, len(value))
  return value.at[target].add(update, mode='drop', unique_indices=True)


def _add_window(
  references: References,
  weight: Float[Array, 'T k c'],
  cotangent: Float[Array, 'T E W'],
  pool: Int[Array, 'T k'] | None,
  first_position: Int[Array, ''] | int,
  add: Callable,
  block_bytes: int,
  value: Float[Array, 'U W'],
):
  """Adds the window's references to `value`, a chunk at a time."""
  budget, width = value.shape
  num_references = references.row.size
  row_bytes = width * value.dtype.itemsize
  size = max(1, min(num_references, block_bytes // row_bytes))
  end_position = jnp.minimum(first_position + budget, references.num_distinct)
  start, end = jnp.searchsorted(
    references.row_position,
    jnp.stack([jnp.minimum(first_position, end_position), end_position]),
  )

  def add_block(i: Int[Array, ''], value: Float[Array, 'U W']):
    at = start + i * size + jnp.arange(size)
    is_in = at < end
    position = references.position.at[at].get(mode='clip')
    row_position = references.row_position.at[at].get(mode='clip')
    update = updates_at(position, weight, pool, cotangent, value.dtype)
    # Beyond the window: past the buffer, whose scatter drops it.
    target = jnp.where(is_in, row_position - first_position, budget)
    return add(value, target, update)

  num_blocks = (end - start + size - 1) // size
  return jax.lax.fori_loop(0, num_blocks, add_block, value)
