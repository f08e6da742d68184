# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of rows of a table for a few tokens, as a Triton kernel.

XLA gathers the rows, splits their weights by pool and multiplies: five kernels
that write and read the rows again. Here a program has a tile of columns of one
token and loads that part of all its rows at once, so that it waits for memory
once. Codes of 8 or 4 bits are read as they are stored, and the scale beside
them.

Letters: M rows, W value width, T tokens, k rows per token, c cores, E pools.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from jaxsparse.ops.kernels import probe
from jaxsparse.ops.tables.quantized_table import QuantizedTable

# Columns of a tile, at least as many as fill a sector of memory with 16 bits,
# and rows at once.
_COLUMNS, _LEAST_COLUMNS, _ROWS = 64, 16, 128
# Rows of a token: those of more would be loaded by a loop.
_MOST_ROWS = 512
_WARPS = 4


def unsupported_reason(
  table: Float[Array, 'M W'] | QuantizedTable,
  slot: Int[Array, 'T k'],
  weight: Float[Array, 'T k c'],
  pool: Int[Array, 'T k'] | None = None,
  num_pools: int = 1,
) -> str | None:
  """What keeps the kernel from serving such a bag here, in words."""
  return _unserved(table, slot, weight) or probe.unsupported_reason(
    bag, table, slot, weight, pool, num_pools=num_pools
  )


def _unserved(
  table: Float[Array, 'M W'] | QuantizedTable,
  slot: Int[Array, 'T k'],
  weight: Float[Array, 'T k c'],
):
  if weight.dtype == jnp.float64:
    return 'it sums in f32'
  if isinstance(table, QuantizedTable):
    if table.kind not in ('int8', 'int4') or table.scale is not None:
      return 'it reads rows of int8 or int4 with their scales inside'
  elif table.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    return f'it takes 16 or 32 bits and not {table.dtype}'
  if not 0 < slot.shape[1] <= _MOST_ROWS:
    return f'{slot.shape[1]} rows of a token are not 1 to {_MOST_ROWS}'
  columns = _columns(table, weight.shape[2])
  if columns < _LEAST_COLUMNS:
    return f'tiles of {columns} columns are too narrow'
  return None


def bag(
  table: Float[Array, 'M W'] | QuantizedTable,
  slot: Int[Array, 'T k'],
  weight: Float[Array, 'T k c'],
  pool: Int[Array, 'T k'] | None = None,
  num_pools: int = 1,
  *,
  interpret: bool = False,
) -> Float[Array, 'T {num_pools} W']:
  """`ops.memory.value_bag.value_bag` on a GPU, without a gradient.

  Args:
    table: rows to read, of floats or of codes.
    slot: row of each of a token's k entries.
    weight: c weights of each entry, one for each column block.
    pool: of each entry; None puts all into the only one.
    num_pools: pools per token.
    interpret: run in Pallas interpret mode (tests).

  Returns:
    The sums in f32.
  """
  num_tokens, num_entries = slot.shape
  num_cores, width = weight.shape[2], table.shape[1]
  columns = _columns(table, num_cores)

  def kernel(
    stored: jax.Ref,
    slot_ref: jax.Ref,
    weight_ref: jax.Ref,
    pool_ref: jax.Ref | None,
    out: jax.Ref,
  ):
    t, tile = pl.program_id(0), pl.program_id(1)
    column = tile * columns + jnp.arange(columns)
    core = tile * columns // (width // num_cores)
    sums = [jnp.zeros(columns, jnp.float32)] * num_pools
    for first in range(0, num_entries, _ROWS):
      entry = first + jnp.arange(
        min(_ROWS, pl.next_power_of_2(num_entries - first))
      )
      is_entry = entry < num_entries
      # Entries beyond the last repeat it, with a weight of zero.
      entry = jnp.minimum(entry, num_entries - 1)
      rows = triton.load(slot_ref.at[t, entry])
      factor = jnp.where(
        is_entry, triton.load(weight_ref.at[t, entry, core]), 0
      )
      values, scale = _read(table, stored, rows, column, tile * columns)
      values *= (factor if scale is None else factor * scale)[:, None]
      if pool_ref is None:
        sums[0] += values.sum(0)
        continue
      pools = triton.load(pool_ref.at[t, entry])
      for e in range(num_pools):
        is_own = (pools == e)[:, None]
        sums[e] += jnp.where(is_own, values, 0).sum(0)
    for e in range(num_pools):
      triton.store(out.at[t, e, column], sums[e])

  shape = (num_tokens, num_pools, width)
  mat = jax.typeof(slot).manual_axis_type
  return pl.pallas_call(
    kernel,
    grid=(num_tokens, width // columns),
    out_shape=jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=mat),
    compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
    interpret=interpret,
    name='bag',
  )(_stored(table), slot, weight.astype(jnp.float32), pool)


def _read(
  table: Float[Array, 'M W'] | QuantizedTable,
  stored: jax.Ref,
  rows: Int[Array, 'k'],
  column: Int[Array, 'n'],
  first: Int[Array, ''],
):
  """Numbers [k, columns] in f32, and their scales, which they still lack.

  Columns of a tile are of one part, and of one half of its bytes.
  """
  if not isinstance(table, QuantizedTable):
    values = triton.load(stored.at[rows[:, None], column[None]])
    return values.astype(jnp.float32), None
  halves = _halves(table)
  part_bytes = table.stored.shape[1] // table.num_own_parts
  part = first // table.part_width
  within = column - part * table.part_width
  half_width = table.part_width // halves
  half = (first - part * table.part_width) // half_width
  at = part * part_bytes + within - half * half_width
  codes = triton.load(stored.at[rows[:, None], at[None]]).astype(jnp.int32)
  # To the top, and down again with the sign.
  up = 24 if halves == 1 else 28 - 4 * half
  values = ((codes << up) >> (24 if halves == 1 else 28)).astype(jnp.float32)
  end = (part + 1) * part_bytes
  bits = sum(
    triton.load(stored.at[rows, end - 4 + i]).astype(jnp.uint32) << (8 * i)
    for i in range(4)
  )
  return values, jax.lax.bitcast_convert_type(bits, jnp.float32)


def _stored(table: Float[Array, 'M W'] | QuantizedTable):
  return table.stored if isinstance(table, QuantizedTable) else table


def _halves(table: Float[Array, 'M W'] | QuantizedTable):
  is_packed = isinstance(table, QuantizedTable) and table.kind == 'int4'
  return 2 if is_packed else 1


def _columns(table: Float[Array, 'M W'] | QuantizedTable, num_cores: int):
  """Columns of a tile: all of one core, part and half."""
  block = table.shape[1] // num_cores
  if isinstance(table, QuantizedTable):
    block = math.gcd(block, table.part_width // _halves(table))
  return min(_COLUMNS, block & -block)
