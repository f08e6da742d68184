"""Gradients of `value_bag`, with respect to its weights and to its table.

  d weight[t, j, i] = d out[t, g, block i] . table[slot[t, j], block i]
  d table[slot[t, j], block i] += weight[t, j, i] d out[t, g, block i]

for g = group[t, j]. Neither keeps the T * k rows. The gradient of the table is
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

# What a bag is made of.
Table = Float[Array, 'M W']
Slots = Int[Array, 'T k']
Weights = Float[Array, 'T k c']
Groups = Int[Array, 'T k'] | None
NumUsed = Int[Array, 'T'] | None
Pools = Float[Array, 'T G W']

WAYS = ('scatter', 'sorted', 'deterministic')

# Entries of a piece on a GPU where not all can be fused.
_ENTRIES_GPU = 8


@jax.jit
def of_weight(
  table: Table,
  slot: Slots,
  weight: Weights,
  group: Groups,
  num_used: NumUsed,
  cotangent: Pools,
):
  """Gradient [T, k, c] with respect to the weights."""
  if slot.size == 0:
    return jnp.zeros_like(weight)
  return jax.lax.platform_dependent(
    table, slot, weight, group, num_used, cotangent,
    cpu=_of_weight_chunked(chunking.CHUNK_BYTES_CPU),
    tpu=_of_weight_chunked(chunking.CHUNK_BYTES),
    default=_of_weight_whole,
  )  # fmt: skip


@functools.partial(jax.jit, static_argnames=('way',))
def of_table(
  table: Table,
  slot: Slots,
  weight: Weights,
  group: Groups,
  num_used: NumUsed,
  cotangent: Pools,
  way: str,
):
  """Gradient [M, W] with respect to the table, added up as `way` says."""
  if slot.size == 0:
    return jnp.zeros_like(table)
  ways = dict(
    scatter=(_scatter_chunked, _scatter_whole),
    sorted=(_sorted_blocks, _sorted_whole),
    deterministic=(_scatter_chunked, _distinct_rows),
  )
  sequential, parallel = ways[way]
  return jax.lax.platform_dependent(
    table, slot, weight, group, num_used, cotangent,
    cpu=sequential(chunking.CHUNK_BYTES_CPU),
    tpu=sequential(chunking.CHUNK_BYTES),
    default=parallel,
  ).astype(table.dtype)  # fmt: skip


def _of_pool(cotangent_TGW: Pools, group: Groups):
  """The cotangent of each entry's pool: [T, k, W], or [T, 1, W] for all."""
  if group is None:
    return cotangent_TGW
  return jax.vmap(chunking.rows)(cotangent_TGW, group)


def _split(x: Float[Array, '*S W'], num_cores: int):
  return x.reshape(*x.shape[:-1], num_cores, -1)


def _of_weight_whole(
  table: Table,
  slot: Slots,
  weight: Weights,
  group: Groups,
  num_used: NumUsed,
  cotangent: Pools,
):
  """By a sum of products, which a GPU fuses with the gather of the rows."""
  dtype = chunking.accumulator(table, cotangent)

  def step(_: None, entries: tuple):
    slot, group = entries
    rows_TkW = chunking.rows(table, slot).astype(dtype)
    pooled_TkW = _of_pool(cotangent.astype(dtype), group)
    return None, _split(rows_TkW * pooled_TkW, weight.shape[-1]).sum(-1)

  at_once = slot.shape[1] if num_used is None else _ENTRIES_GPU
  _, d_weight = chunking.over_entries(
    step, None, (slot, group), num_used, at_once
  )
  return d_weight.astype(weight.dtype)


def _of_weight_chunked(chunk_bytes: int):
  """By a matmul of gathered rows with all of a token's pools.

  A CPU adds up a sum of products one by one.
  """

  def of_weight(
    table: Table,
    slot: Slots,
    weight: Weights,
    group: Groups,
    num_used: NumUsed,
    cotangent: Pools,
  ):
    dtype = chunking.accumulator(table, cotangent)
    at_once = chunking.entries_at_once(slot, num_used)
    num_cores = weight.shape[-1]

    def on_chunk(_: None, chunk: tuple):
      cotangent_tGW, num_used, *entries = chunk

      def step(_: None, entries: tuple):
        slot, group = entries
        d_weight_tkGc = jnp.einsum(
          'tkcw,tgcw->tkgc',
          _split(chunking.rows(table, slot).astype(dtype), num_cores),
          _split(cotangent_tGW.astype(dtype), num_cores),
          precision=jax.lax.Precision.HIGHEST,
        )
        if group is None:
          return None, d_weight_tkGc[:, :, 0]
        is_own = jax.nn.one_hot(group, d_weight_tkGc.shape[2], dtype=bool)
        return None, jnp.where(is_own[..., None], d_weight_tkGc, 0).sum(2)

      return chunking.over_entries(
        step, None, tuple(entries), num_used, at_once
      )

    _, d_weight = chunking.over_tokens(
      on_chunk,
      None,
      (cotangent, num_used, slot, group),
      chunk_bytes // (at_once * table[0].nbytes),
    )
    return d_weight.astype(weight.dtype)

  return of_weight


def _nothing(table: Table, weight: Weights, slot: Slots):
  dtype = chunking.accumulator(table, weight)
  return chunking.zeros(table.shape, dtype, table, slot)


def _scatter(d_table: Table, cotangent_TGW: Pools, entries: tuple):
  """Adds the entries' outer products to `d_table`.

  Whole rows in f32: scalar and bf16 updates would each cost an order of
  magnitude on some backend. Slot M is nobody's.
  """
  slot, weight, group = entries
  dtype = d_table.dtype
  pooled_TkW = _of_pool(cotangent_TGW.astype(dtype), group)
  update = weight.astype(dtype)[..., None] * _split(
    pooled_TkW, weight.shape[-1]
  )
  return d_table.at[slot.reshape(-1)].add(
    update.reshape(-1, d_table.shape[1]), mode='drop'
  )


def _without_unused(slot: Slots, num_used: NumUsed, num_rows: int):
  """Slots, M where not in use: else row 0 would take an add for each."""
  if num_used is None:
    return slot
  in_use = jnp.arange(slot.shape[1])[None] < num_used[:, None]
  return jnp.where(in_use, slot, num_rows)


def _scatter_whole(
  table: Table,
  slot: Slots,
  weight: Weights,
  group: Groups,
  num_used: NumUsed,
  cotangent: Pools,
):
  def step(d_table: Table, entries: tuple):
    return _scatter(d_table, cotangent, entries), None

  slot = _without_unused(slot, num_used, len(table))
  at_once = slot.shape[1] if num_used is None else _ENTRIES_GPU
  d_table, _ = chunking.over_entries(
    step,
    _nothing(table, weight, slot),
    (slot, weight, group),
    num_used,
    at_once,
  )
  return d_table


def _scatter_chunked(chunk_bytes: int):
  def of_table(
    table: Table,
    slot: Slots,
    weight: Weights,
    group: Groups,
    num_used: NumUsed,
    cotangent: Pools,
  ):
    at_once = chunking.entries_at_once(slot, num_used)

    def on_chunk(d_table: Table, chunk: tuple):
      cotangent, num_used, *entries = chunk

      def step(d_table: Table, entries: tuple):
        return _scatter(d_table, cotangent, entries), None

      return chunking.over_entries(
        step, d_table, tuple(entries), num_used, at_once
      )

    slot = _without_unused(slot, num_used, len(table))
    d_table, _ = chunking.over_tokens(
      on_chunk,
      _nothing(table, weight, slot),
      (cotangent, num_used, slot, weight, group),
      chunk_bytes // (at_once * table[0].nbytes),
    )
    return d_table

  return of_table


# Sorted by row. The sort is stable, so the order of adds is fixed.


def _sort(slot: Slots, num_used: NumUsed, num_rows: int):
  """References by row: their rows and positions in [T * k], and how many."""
  slot = _without_unused(slot, num_used, num_rows).reshape(-1)
  position = jnp.arange(len(slot), dtype=slot.dtype)
  row, position = sort_key_val(slot, position)
  return row, position, None if num_used is None else num_used.sum()


def _add_sorted(
  add: Callable,
  table: Table,
  slot: Slots,
  weight: Weights,
  group: Groups,
  num_used: NumUsed,
  cotangent: Pools,
  at_once: int,
):
  """Runs add(d_table, row, update) over blocks of the sorted references."""
  row, position, num_references = _sort(slot, num_used, len(table))
  at_once = min(at_once, len(row))
  size = math.ceil(len(row) / at_once) * at_once
  row = jnp.pad(row, (0, size - len(row)), constant_values=len(table))
  position = chunking.pad(position, size, axis=0)

  def step(d_table: Table, block: tuple):
    row, position = block
    update = updates_at(position[0], weight, group, cotangent, d_table.dtype)
    return add(d_table, row[0], update), None

  d_table, _ = chunking.over_entries(
    step,
    _nothing(table, weight, slot),
    (row[None], position[None]),
    None if num_references is None else num_references[None],
    at_once,
  )
  return d_table


def _add_equal_after_equal(
  d_table: Table, row: Int[Array, 'n'], update: Float[Array, 'n W']
):
  return d_table.at[row].add(update, mode='drop', indices_are_sorted=True)


def _sorted_blocks(chunk_bytes: int):
  def of_table(table: Table, *args: jax.Array | None):
    at_once = max(1, chunk_bytes // table[0].nbytes)
    return _add_sorted(_add_equal_after_equal, table, *args, at_once)

  return of_table


def _sorted_whole(
  table: Table,
  slot: Slots,
  weight: Weights,
  group: Groups,
  num_used: NumUsed,
  *args: jax.Array | None,
):
  at_once = slot.size if num_used is None else REFERENCES_GPU
  return _add_sorted(
    _add_equal_after_equal, table, slot, weight, group, num_used, *args, at_once
  )


def _add_once_per_row(
  d_table: Table, row: Int[Array, 'n'], update: Float[Array, 'n W']
):
  row, update = sum_equal_rows(row, update, len(d_table))
  return d_table.at[row].add(update, mode='drop', unique_indices=True)


def _distinct_rows(*args: jax.Array | None):
  return _add_sorted(_add_once_per_row, *args, REFERENCES_GPU)
