# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of rows of a value table, and their gradients.

  out[t, e, columns i] = sum over j with pool[t, j] = e of
      weight[t, j, i] * table[slot[t, j], columns i]

Core i's weight scales the i-th of c equal column blocks (multi-core scoring),
and the pools are the virtual blocks of implicit value expansion, summed apart
because each has its own projection (arXiv:2411.12364).

The obvious code, gather then einsum, writes all T * k rows to memory, and
autodiff keeps them for the backward pass. Here the gradient is written by hand
and recomputes them, and each backend gets the form that its compiler turns
into code without that buffer:
  * GPU: the sum over k is unrolled: all gathers, products and sums fuse into
  one kernel, for as many tokens at once as XLA agrees to fuse; with few
    tokens, as in decoding, that kernel would be short of threads, and rows are
    gathered for a matmul;
  * CPU in f32 with one pool: the same in chunks of the k entries, over which a
    loop goes;
  * TPU, and otherwise CPU: tokens go in chunks whose rows stay in fast memory,
    and a matmul sums them. With four pools and two cores a CPU does that in
    half of the time and less: the loop would add each row to every pool.
Sums are in f32 (f64 for f64) throughout. The gradients are in
`value_bag_gradient`.

Letters: M rows, W value width, T tokens, k rows per token, c cores, E pools.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.config.errors import UserError
from jaxsparse.ops import chunking
from jaxsparse.ops.kernels import bag as kernel
from jaxsparse.ops.memory import value_bag_gradient as gradient
from jaxsparse.ops.memory.value_bag_gradient import (
  NumValid,
  PoolIndices,
  Pools,
  Slots,
  Table,
  Weights,
)
from jaxsparse.ops.shard_map_vma import match_vma
from jaxsparse.ops.tables.quantized_bag import one_pool_bag
from jaxsparse.ops.tables.quantized_table import QuantizedTable

# Entries of a chunk, where not all are fused. On a CPU the sums should stay in
# the cache, and compile time counts.
_UNROLL_GPU = 28
_UNROLL_CPU = 8

# A GPU fuses all entries up to this many; more take too long to compile.
_FUSED_ENTRIES = 128

# Elements of all rows up to which a GPU gathers them.
_FEW_READS = 2**24

# Elements read by one GPU kernel, the same row for several pools counting for
# each. From twice as many on, XLA's cost model splits some kernels: then slots,
# weights and at last rows go through memory.
_FUSED_READS = 2**24


def value_bag(
  table: Float[Array, 'M W'] | QuantizedTable,
  slot: Int[Array, 'T k'],
  weight: Float[Array, 'T k c'],
  pool: Int[Array, 'T k'] | None = None,
  num_pools: int = 1,
  *,
  num_valid: Int[Array, 'T'] | None = None,
  table_gradient: str = 'scatter',
) -> Float[Array, 'T {num_pools} W']:
  """Weighted sums of rows of `table`, one for each pool of a token.

  Slots and pools must be in range; they are not checked, because a clamp or
  a fill costs as much as the load. Each device works on what it holds: under a
  mesh, call it in `mesh.over_tokens` with the table replicated.

  The gradient with respect to the table is dense. Behind `stop_gradient` it is
  dead code, which the compiler removes.

  Args:
    table: rows to read. A quantized one is read in place and gets no gradient.
    slot: row of each of a token's k entries; repeats count each time.
    weight: c weights of each entry, one for each column block.
    pool: of each entry; None puts all into the only one.
    num_pools: pools per token.
    num_valid: how many of a token's entries count, from the first on; None for
      all. What the others hold is of no influence, and the time follows the
      largest number of entries in use.
    table_gradient: how rows are added to the gradient of the table.
      'scatter': one by one; on a GPU by atomic adds, in no fixed order.
      'sorted': sorted by row, so that equal rows follow one another.
      'deterministic': in a fixed order on every backend, so that a second run
      gives the same bits.

  Returns:
    The sums in f32 (f64 for f64 input).

  Raises:
    UserError: `table_gradient` is none of the above.
  """
  if table_gradient not in gradient.ACCUMULATION_MODES:
    raise UserError(
      f'table_gradient = {table_gradient!r} must be one of '
      f'{", ".join(map(repr, gradient.ACCUMULATION_MODES))}.'
    )
  if num_valid is not None:
    in_use = jnp.arange(slot.shape[1])[None] < num_valid[:, None]
    slot = jnp.where(in_use, slot, 0)
    weight = jnp.where(in_use[..., None], weight, 0)
    pool = None if pool is None else jnp.where(in_use, pool, 0)
  return _value_bag(
    *match_vma(table, slot, weight, pool, num_valid),
    num_pools,
    table_gradient,
  )


def value_bag_reference(
  table: Float[Array, 'M W'],
  slot: Int[Array, 'T k'],
  weight: Float[Array, 'T k c'],
  pool: Int[Array, 'T k'] | None = None,
  num_pools: int = 1,
  *,
  num_valid: Int[Array, 'T'] | None = None,
) -> Float[Array, 'T {num_pools} W']:
  """`value_bag` by gathering all rows and leaving the gradient to autodiff."""
  dtype = chunking.accumulator(table, weight)
  if pool is None:
    pool = jnp.zeros_like(slot)
  if num_valid is not None:
    in_use = jnp.arange(slot.shape[1])[None] < num_valid[:, None]
    weight = jnp.where(in_use[..., None], weight, 0)
  rows_TkW = table[slot].astype(dtype)
  weight_TkW = jnp.repeat(weight, table.shape[1] // weight.shape[2], axis=2)
  one_hot_TkE = jax.nn.one_hot(pool, num_pools, dtype=dtype)
  return jnp.einsum('tkw,tkw,tke->tew', rows_TkW, weight_TkW, one_hot_TkE)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _value_bag(
  table: Table,
  slot: Slots,
  weight: Weights,
  pool: PoolIndices,
  num_valid: NumValid,
  num_pools: int,
  table_gradient: str,
):
  return _forward(table, slot, weight, pool, num_valid, num_pools)


def _save(
  table: Table,
  slot: Slots,
  weight: Weights,
  pool: PoolIndices,
  num_valid: NumValid,
  num_pools: int,
  table_gradient: str,
):
  inputs = (table, slot, weight, pool, num_valid)
  return _forward(*inputs, num_pools), inputs


def _restore(
  num_pools: int, table_gradient: str, inputs: tuple, cotangent: Pools
):
  d_table = None
  if not isinstance(inputs[0], QuantizedTable):
    # Two programs, not one: the table's is dead code where it is not needed.
    d_table = gradient.table_gradient(*inputs, cotangent, table_gradient)
  d_weight = gradient.weight_gradient(*inputs, cotangent)
  return d_table, None, d_weight, None, None


_value_bag.defvjp(_save, _restore)


# Compiled as a function of its own: layers of one size share a trace.
@functools.partial(jax.jit, static_argnames=('num_pools',))
def _forward(
  table: Table,
  slot: Slots,
  weight: Weights,
  pool: PoolIndices,
  num_valid: NumValid,
  num_pools: int,
):
  if slot.size == 0:
    shape = (slot.shape[0], num_pools, table.shape[1])
    return jnp.zeros(shape, chunking.accumulator(table, weight))

  def unrolled(chunk_size: int):
    return functools.partial(
      _forward_unrolled, num_pools=num_pools, chunk_size=chunk_size
    )

  def chunked(chunk_bytes: int):
    return functools.partial(
      _forward_chunked, num_pools=num_pools, chunk_bytes=chunk_bytes
    )

  def of_all(form: Callable):
    return lambda *args: form(*args[:-1], num_pools)

  def quantized(
    table: QuantizedTable,
    slot: Slots,
    weight: Weights,
    pool: PoolIndices,
    num_valid: NumValid,
  ):
    return one_pool_bag(table, slot, weight, num_valid)

  by_matmul = table.dtype.itemsize < 4 or pool is not None
  on_cpu = chunked(chunking.CHUNK_BYTES_CPU)
  if not by_matmul:
    is_quantized = isinstance(table, QuantizedTable)
    on_cpu = quantized if is_quantized else unrolled(_UNROLL_CPU)
  if num_valid is None and slot.size * table.shape[1] <= _FEW_READS:
    why_not = kernel.unsupported_reason(table, slot, weight, pool, num_pools)
    on_gpu = of_all(_forward_gathered if why_not else kernel.bag)
  elif num_valid is None and slot.shape[1] <= _FUSED_ENTRIES:
    on_gpu = of_all(_forward_fused)
  else:
    on_gpu = unrolled(_UNROLL_GPU)
  return jax.lax.platform_dependent(
    table, slot, weight, pool, num_valid,
    cpu=on_cpu,
    tpu=chunked(chunking.CHUNK_BYTES),
    default=on_gpu,
  )  # fmt: skip


def _with_pools(
  weight: Float[Array, '*T c'], pool: Int[Array, '*T'] | None, num_pools: int
):
  """Weights [..., E, c]: an entry's own in its pool, zero in the others."""
  if pool is None:
    return weight[..., None, :]
  is_own = jax.nn.one_hot(pool, num_pools, dtype=bool)
  return jnp.where(is_own[..., None], weight[..., None, :], 0)


def _forward_unrolled(
  table: Table,
  slot: Slots,
  weight: Weights,
  pool: PoolIndices,
  num_valid: NumValid,
  num_pools: int,
  chunk_size: int,
):
  dtype = chunking.accumulator(table, weight)
  num_tokens, num_cores, width = len(slot), weight.shape[2], table.shape[1]

  def add(pooled_TEW: Pools, entries: tuple):
    slot, weight_TkEc = entries
    for j in range(slot.shape[1]):
      # Weights are spread over the columns, and the table is not split by
      # them: XLA may give a reshaped table another layout, and copy all of it.
      weight_TEW = jnp.repeat(weight_TkEc[:, j], width // num_cores, axis=2)
      rows_TW = chunking.rows(table, slot[:, j]).astype(dtype)
      pooled_TEW += weight_TEW * rows_TW[:, None]
    return pooled_TEW, None

  # Weights by pool at once: a GPU would write them entry by entry.
  weight_TkEc = _with_pools(weight.astype(dtype), pool, num_pools)
  pooled_TEW, _ = chunking.scan_entries(
    add,
    chunking.zeros((num_tokens, num_pools, width), dtype, table, slot),
    (slot, weight_TkEc),
    num_valid,
    chunk_size,
  )
  return pooled_TEW


def _forward_gathered(
  table: Table, slot: Slots, weight: Weights, pool: PoolIndices, num_pools: int
):
  dtype = chunking.accumulator(table, weight)
  pooled_TEcW = jnp.einsum(
    'tkec,tkw->tecw',
    _with_pools(weight.astype(dtype), pool, num_pools),
    chunking.rows(table, slot).astype(dtype),
    precision=jax.lax.Precision.HIGHEST,
  )
  # Each core's own block of all columns: to multiply only those, all rows would
  # be transposed.
  *shape, num_cores, width = pooled_TEcW.shape
  blocks = pooled_TEcW.reshape(*shape, num_cores, num_cores, -1)
  own = [blocks[:, :, i, i] for i in range(num_cores)]
  return jnp.stack(own, axis=2).reshape(*shape, width)


def _forward_fused(
  table: Table, slot: Slots, weight: Weights, pool: PoolIndices, num_pools: int
):
  dtype = chunking.accumulator(table, weight)
  (num_tokens, num_entries), width = slot.shape, table.shape[1]
  num_cores = weight.shape[2]

  def pool_rows(slot: Slots, weight: Weights, pool: PoolIndices):
    shape = (len(slot), num_pools, width)
    pooled_tEW = chunking.zeros(shape, dtype, table, slot)
    for j in range(num_entries):
      rows_tW = chunking.rows(table, slot[:, j]).astype(dtype)
      weight_tc = weight[:, j].astype(dtype)
      rows_tW *= jnp.repeat(weight_tc, width // num_cores, axis=1)
      if pool is None:
        pooled_tEW += rows_tW[:, None]
      else:
        # Not by weights that are zero in other pools: XLA would write those.
        is_own = jax.nn.one_hot(pool[:, j], num_pools, dtype=bool)
        pooled_tEW += jnp.where(is_own[..., None], rows_tW[:, None], 0)
    return pooled_tEW

  chunk_size = max(1, _FUSED_READS // (num_entries * num_pools * width))
  chunk_size = 1 << (
    chunk_size.bit_length() - 1
  )  # XLA splits odd sizes earlier.
  if num_tokens <= chunk_size:
    return pool_rows(slot, weight, pool)

  def pool_some(i: Int[Array, ''], pooled_TEW: Pools):
    # Cuts that reach beyond the end are moved back: the last tokens are pooled
    # twice where chunk_size does not divide them, to the same sums.
    some = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, i * chunk_size, chunk_size),
      (slot, weight, pool),
    )
    return jax.lax.dynamic_update_slice_in_dim(
      pooled_TEW, pool_rows(*some), i * chunk_size, axis=0
    )

  shape = (num_tokens, num_pools, width)
  pooled_TEW = chunking.zeros(shape, dtype, table, slot)
  num_kernels = math.ceil(num_tokens / chunk_size)
  return jax.lax.fori_loop(0, num_kernels, pool_some, pooled_TEW)


def _forward_chunked(
  table: Table,
  slot: Slots,
  weight: Weights,
  pool: PoolIndices,
  num_valid: NumValid,
  num_pools: int,
  chunk_bytes: int,
):
  dtype = chunking.accumulator(table, weight)
  num_cores, width = weight.shape[2], table.shape[1]
  chunk_size = chunking.entries_per_chunk(slot, num_valid)

  def add(pooled_tEcw: Float[Array, 't E c w'], entries: tuple):
    slot, weight, pool = entries
    rows_tkW = chunking.rows(table, slot).astype(dtype)
    pooled_tEcw += jnp.einsum(
      'tkec,tkcw->tecw',
      _with_pools(weight.astype(dtype), pool, num_pools),
      rows_tkW.reshape(*rows_tkW.shape[:2], num_cores, -1),
      precision=jax.lax.Precision.HIGHEST,
    )
    return pooled_tEcw, None

  def pool_rows(_: None, chunk: tuple):
    *entries, num_valid = chunk
    shape = (len(entries[0]), num_pools, num_cores, width // num_cores)
    nothing = chunking.zeros(shape, dtype, table, slot)
    pooled, _ = chunking.scan_entries(
      add, nothing, tuple(entries), num_valid, chunk_size
    )
    return None, pooled

  _, pooled = chunking.scan_tokens(
    pool_rows,
    None,
    (slot, weight, pool, num_valid),
    chunk_bytes // (chunk_size * chunking.row_nbytes(table)),
  )
  return pooled.reshape(slot.shape[0], num_pools, width)
