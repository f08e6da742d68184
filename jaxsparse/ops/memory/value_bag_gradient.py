# SPDX-License-Identifier: Apache-2.0
"""Gradients of `value_bag`, with respect to its weights and to its table.

  d weight[t, j, i] = d out[t, e, columns i] . table[slot[t, j], columns i]
  d table[slot[t, j], columns i] += weight[t, j, i] d out[t, e, columns i]

for e = pool[t, j]. Neither keeps the T * k rows. The gradient of the table is
dense, and adding to its rows has an order: on a CPU and a TPU that of the
scatter's loop, on a GPU none, since its scatter adds atomically. A fixed order
there takes a sort.

Letters as in `value_bag`; R = T * k references to rows.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops import chunking
from jaxsparse.ops.memory.segment_sum import (
  REFERENCES_GPU,
  sum_equal_rows,
  updates_at,
)
from jaxsparse.ops.shard_map_vma import sort_key_val
from jaxsparse.ops.tables.quantized_table import QuantizedTable

# What a bag is made of.
Table = Float[Array, 'M W'] | QuantizedTable
Slots = Int[Array, 'T k']
Weights = Float[Array, 'T k c']
PoolIndices = Int[Array, 'T k'] | None
NumValid = Int[Array, 'T'] | None
Pools = Float[Array, 'T E W']

ACCUMULATION_MODES = ('scatter', 'sorted', 'deterministic')

# Entries of a chunk on a GPU where not all can be fused.
_ENTRIES_GPU = 8


@jax.jit
def weight_gradient(
  table: Table,
  slot: Slots,
  weight: Weights,
  pool: PoolIndices,
  num_valid: NumValid,
  cotangent: Pools,
):
  """Gradient [T, k, c] with respect to the weights."""
  if slot.size == 0:
    return jnp.zeros_like(weight)
  return jax.lax.platform_dependent(
    table, slot, weight, pool, num_valid, cotangent,
    cpu=_weight_gradient_chunked(chunking.CHUNK_BYTES_CPU),
    tpu=_weight_gradient_chunked(chunking.CHUNK_BYTES),
    default=_weight_gradient_whole,
  )  # fmt: skip


@functools.partial(jax.jit, static_argnames=('way',))
def table_gradient(
  table: Table,
  slot: Slots,
  weight: Weights,
  pool: PoolIndices,
  num_valid: NumValid,
  cotangent: Pools,
  way: str,
):
  """Gradient [M, W] with respect to the table, added up as `way` says."""
  if slot.size == 0:
    return jnp.zeros_like(table)
  ways = dict(
    scatter=(_scatter_chunked, _scatter_whole),
    sorted=(_sorted_chunks, _sorted_whole),
    deterministic=(_scatter_chunked, _distinct_rows),
  )
  sequential, parallel = ways[way]
  return jax.lax.platform_dependent(
    table, slot, weight, pool, num_valid, cotangent,
    cpu=sequential(chunking.CHUNK_BYTES_CPU),
    tpu=sequential(chunking.CHUNK_BYTES),
    default=parallel,
  ).astype(table.dtype)  # fmt: skip


def _of_pool(cotangent_TEW: Pools, pool: PoolIndices):
  """The cotangent of each entry's pool: [T, k, W], or [T, 1, W] for all."""
  if pool is None:
    return cotangent_TEW
  return jax.vmap(chunking.rows)(cotangent_TEW, pool)


def _split(x: Float[Array, '*S W'], num_cores: int):
  return x.reshape(*x.shape[:-1], num_cores, -1)


def _weight_gradient_whole(
  table: Table,
  slot: Slots,
  weight: Weights,
  pool: PoolIndices,
  num_valid: NumValid,
  cotangent: Pools,
):
  """By a sum of products, which a GPU fuses with the gather of the rows."""
  dtype = chunking.accumulator(table, cotangent)

  def step(_: None, entries: tuple):
    slot, pool = entries
    rows_TkW = chunking.rows(table, slot).astype(dtype)
    pooled_TkW = _of_pool(cotangent.astype(dtype), pool)
    return None, _split(rows_TkW * pooled_TkW, weight.shape[-1]).sum(-1)

  chunk_size = slot.shape[1] if num_valid is None else _ENTRIES_GPU
  _, d_weight = chunking.scan_entries(
    step, None, (slot, pool), num_valid, chunk_size
  )
  return d_weight.astype(weight.dtype)


def _weight_gradient_chunked(chunk_bytes: int):
  """By a matmul of gathered rows with all of a token's pools.

  A CPU adds up a sum of products one by one.
  """

  def weight_gradient(
    table: Table,
    slot: Slots,
    weight: Weights,
    pool: PoolIndices,
    num_valid: NumValid,
    cotangent: Pools,
  ):
    dtype = chunking.accumulator(table, cotangent)
    chunk_size = chunking.entries_per_chunk(slot, num_valid)
    num_cores = weight.shape[-1]

    def on_chunk(_: None, chunk: tuple):
      cotangent_tEW, num_valid, *entries = chunk

      def step(_: None, entries: tuple):
        slot, pool = entries
        d_weight_tkEc = jnp.einsum(
          'tkcw,tecw->tkec',
          _split(chunking.rows(table, slot).astype(dtype), num_cores),
          _split(cotangent_tEW.astype(dtype), num_cores),
          precision=jax.lax.Precision.HIGHEST,
        )
        if pool is None:
          return None, d_weight_tkEc[:, :, 0]
        is_own = jax.nn.one_hot(pool, d_weight_tkEc.shape[2], dtype=bool)
        return None, jnp.where(is_own[..., None], d_weight_tkEc, 0).sum(2)

      return chunking.scan_entries(
        step, None, tuple(entries), num_valid, chunk_size
      )

    _, d_weight = chunking.scan_tokens(
      on_chunk,
      None,
      (cotangent, num_valid, slot, pool),
      chunk_bytes // (chunk_size * chunking.row_nbytes(table)),
    )
    return d_weight.astype(weight.dtype)

  return weight_gradient


def _zeros_like_table(table: Table, weight: Weights, slot: Slots):
  dtype = chunking.accumulator(table, weight)
  return chunking.zeros(table.shape, dtype, table, slot)


def _scatter(d_table: Table, cotangent_TEW: Pools, entries: tuple):
  """Adds the entries' outer products to `d_table`.

  Whole rows in f32: scalar and bf16 updates would each cost an order of
  magnitude on some backend. Row M is out of range.
  """
  slot, weight, pool = entries
  dtype = d_table.dtype
  pooled_TkW = _of_pool(cotangent_TEW.astype(dtype), pool)
  update = weight.astype(dtype)[..., None] * _split(
    pooled_TkW, weight.shape[-1]
  )
  return d_table.at[slot.reshape(-1)].add(
    update.reshape(-1, d_table.shape[1]), mode='drop'
  )


def _without_unused(slot: Slots, num_valid: NumValid, num_rows: int):
  """Slots, M where not in use: else row 0 would take an add for each."""
  if num_valid is None:
    return slot
  in_use = jnp.arange(slot.shape[1])[None] < num_valid[:, None]
  return jnp.where(in_use, slot, num_rows)


def _scatter_whole(
  table: Table,
  slot: Slots,
  weight: Weights,
  pool: PoolIndices,
  num_valid: NumValid,
  cotangent: Pools,
):
  def step(d_table: Table, entries: tuple):
    return _scatter(d_table, cotangent, entries), None

  slot = _without_unused(slot, num_valid, len(table))
  chunk_size = slot.shape[1] if num_valid is None else _ENTRIES_GPU
  d_table, _ = chunking.scan_entries(
    step,
    _zeros_like_table(table, weight, slot),
    (slot, weight, pool),
    num_valid,
    chunk_size,
  )
  return d_table


def _scatter_chunked(chunk_bytes: int):
  def table_gradient(
    table: Table,
    slot: Slots,
    weight: Weights,
    pool: PoolIndices,
    num_valid: NumValid,
    cotangent: Pools,
  ):
    chunk_size = chunking.entries_per_chunk(slot, num_valid)

    def on_chunk(d_table: Table, chunk: tuple):
      cotangent, num_valid, *entries = chunk

      def step(d_table: Table, entries: tuple):
        return _scatter(d_table, cotangent, entries), None

      return chunking.scan_entries(
        step, d_table, tuple(entries), num_valid, chunk_size
      )

    slot = _without_unused(slot, num_valid, len(table))
    d_table, _ = chunking.scan_tokens(
      on_chunk,
      _zeros_like_table(table, weight, slot),
      (cotangent, num_valid, slot, weight, pool),
      chunk_bytes // (chunk_size * chunking.row_nbytes(table)),
    )
    return d_table

  return table_gradient


# Sorted by row. The sort is stable, so the order of adds is fixed.


def _sort(slot: Slots, num_valid: NumValid, num_rows: int):
  """References by row: their rows and positions in [T * k], and how many."""
  slot = _without_unused(slot, num_valid, num_rows).reshape(-1)
  position = jnp.arange(len(slot), dtype=slot.dtype)
  row, position = sort_key_val(slot, position)
  return row, position, None if num_valid is None else num_valid.sum()


def _add_sorted(
  add: Callable,
  table: Table,
  slot: Slots,
  weight: Weights,
  pool: PoolIndices,
  num_valid: NumValid,
  cotangent: Pools,
  chunk_size: int,
):
  """Runs add(d_table, row, update) over chunks of the sorted references."""
  row, position, num_references = _sort(slot, num_valid, len(table))
  chunk_size = min(chunk_size, len(row))
  size = math.ceil(len(row) / chunk_size) * chunk_size
  row = jnp.pad(row, (0, size - len(row)), constant_values=len(table))
  position = chunking.pad(position, size, axis=0)

  def step(d_table: Table, chunk: tuple):
    row, position = chunk
    update = updates_at(position[0], weight, pool, cotangent, d_table.dtype)
    return add(d_table, row[0], update), None

  d_table, _ = chunking.scan_entries(
    step,
    _zeros_like_table(table, weight, slot),
    (row[None], position[None]),
    None if num_references is None else num_references[None],
    chunk_size,
  )
  return d_table


def _add_equal_after_equal(
  d_table: Table, row: Int[Array, 'n'], update: Float[Array, 'n W']
):
  return d_table.at[row].add(update, mode='drop', indices_are_sorted=True)


def _sorted_chunks(chunk_bytes: int):
  def table_gradient(table: Table, *args: jax.Array | None):
    chunk_size = max(1, chunk_bytes // chunking.row_nbytes(table))
    return _add_sorted(_add_equal_after_equal, table, *args, chunk_size)

  return table_gradient


def _sorted_whole(
  table: Table,
  slot: Slots,
  weight: Weights,
  pool: PoolIndices,
  num_valid: NumValid,
  *args: jax.Array | None,
):
  chunk_size = slot.size if num_valid is None else REFERENCES_GPU
  return _add_sorted(
    _add_equal_after_equal,
    table,
    slot,
    weight,
    pool,
    num_valid,
    *args,
    chunk_size,
  )


def _add_once_per_row(
  d_table: Table, row: Int[Array, 'n'], update: Float[Array, 'n W']
):
  row, update = sum_equal_rows(row, update, len(d_table))
  return d_table.at[row].add(update, mode='drop', unique_indices=True)


def _distinct_rows(*args: jax.Array | None):
  return _add_sorted(_add_once_per_row, *args, REFERENCES_GPU)
