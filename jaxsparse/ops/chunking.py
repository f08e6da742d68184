# SPDX-License-Identifier: Apache-2.0
"""Cuts a bag's work into chunks: of entries, of tokens, of references.

What a pooling of T tokens with k entries each reads is T * k rows, too many to
be gathered at once. The loops here go over chunks of them; with `num_valid`
they end after the last chunk in use, so their trip count is not static and
only functions with a gradient of their own may call them.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree, Shaped

from jaxsparse.ops.shard_map_vma import match_vma
from jaxsparse.ops.tables.quantized_table import QuantizedTable

# Gathered rows of one chunk of tokens: for a TPU's fast memory, or for the
# second-level cache of a CPU's core.
CHUNK_BYTES = 2**23
CHUNK_BYTES_CPU = 2**21

# Entries per chunk where a loop over them can end early.
_ENTRIES = 8


def accumulator(*arrays: jax.Array | QuantizedTable):
  """The type in which sums are kept: f32, or f64 where any array is."""
  types = [x.dtype for x in arrays]
  return jnp.promote_types(jnp.result_type(*types), jnp.float32)


def row_nbytes(table: Shaped[Array, 'M W'] | QuantizedTable) -> int:
  """Bytes of a row after it is read."""
  return table.shape[1] * table.dtype.itemsize


def read_in_place(table: Shaped[Array, 'M ...'], index: Int[Array, '...']):
  """Both unchanged; a loop then reads `table` in place.

  A CPU computes in f32, and XLA takes whatever a loop does to all of a narrow
  table, the same in every iteration, out of the loop: it would hold the whole
  table in f32 beside it. What has passed a barrier with the index differs by
  iteration.
  """
  if table.dtype.itemsize >= 4:
    return table, index
  return jax.lax.platform_dependent(
    table,
    index,
    cpu=lambda *arrays: jax.lax.optimization_barrier(arrays),
    default=lambda *arrays: arrays,
  )


def rows(
  table: Shaped[Array, 'M ...'] | QuantizedTable, slot: Int[Array, '...']
):
  """Rows of a table, those of a quantized one as numbers."""
  if isinstance(table, QuantizedTable):
    return table.read(lambda x: rows(x, slot))
  table, slot = read_in_place(table, slot)
  # Negative slots would be taken to count from the end, at a cost.
  return table.at[slot].get(
    mode='promise_in_bounds', wrap_negative_indices=False
  )


def zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, *like: PyTree):
  """Zeros that vary over the mesh axes over which any of `like` does."""
  return match_vma(jnp.zeros(shape, dtype), *like)[0]


def pad(x: jax.Array, size: int, axis: int):
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, size - x.shape[axis])
  return jnp.pad(x, padding) if size > x.shape[axis] else x


def entries_per_chunk(
  slot: Int[Array, 'T k'], num_valid: Int[Array, 'T'] | None
):
  """Entries per chunk: all, or few if the loop can end before the last."""
  num_entries = slot.shape[1]
  return num_entries if num_valid is None else min(num_entries, _ENTRIES)


def scan_entries(
  step: Callable,
  carry: PyTree,
  entries: PyTree,
  num_valid: Int[Array, 'T'] | None,
  chunk_size: int,
):
  """Runs `step(carry, chunk) -> carry, result` over chunks of the entries.

  Args:
    step: result is an array [T, entries of the chunk, ...] or None.
    entries: arrays [T, k, ...]; padded with zeros where k does not divide.
    num_valid: [T], entries in use; None for all. Chunks after the last entry
      in use are left out, and their results are zero.
    chunk_size: entries per chunk, at most.

  Returns:
    The last carry, and results joined to [T, k, ...].
  """
  num_entries = jax.tree.leaves(entries)[0].shape[1]
  num_chunks = math.ceil(num_entries / chunk_size)
  chunk_size = math.ceil(num_entries / num_chunks)
  if num_chunks == 1 and num_valid is None:
    return step(carry, entries)
  entries = jax.tree.map(lambda x: pad(x, num_chunks * chunk_size, 1), entries)

  def chunk(i: Int[Array, ''] | int):
    return jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, i * chunk_size, chunk_size, 1),
      entries,
    )

  shape = jax.eval_shape(lambda c: step(c, chunk(0))[1], carry)
  results = jax.tree.map(
    lambda x: zeros(
      (x.shape[0], num_chunks * chunk_size, *x.shape[2:]),
      x.dtype,
      carry,
      entries,
    ),
    shape,
  )

  def body(i: Int[Array, ''] | int, state: tuple):
    carry, results = state
    carry, result = step(carry, chunk(i))
    return carry, jax.tree.map(
      lambda all, x: jax.lax.dynamic_update_slice_in_dim(
        all, x, i * chunk_size, 1
      ),
      results,
      result,
    )

  state = (carry, results)
  if num_valid is None:
    # What the carry starts as is fused into the first chunk.
    state = jax.lax.fori_loop(1, num_chunks, body, body(0, state))
  else:
    num_chunks = (num_valid.max() + chunk_size - 1) // chunk_size
    state = jax.lax.fori_loop(0, num_chunks, body, state)
  carry, results = state
  return carry, jax.tree.map(lambda x: x[:, :num_entries], results)


def scan_tokens(pool: Callable, carry: PyTree, arrays: PyTree, max_tokens: int):
  """Runs `pool(carry, chunk) -> carry, result` over chunks of the tokens.

  Args:
    pool: result is an array [t, ...].
    arrays: [T, ...], padded with zeros where the chunks do not divide them.
    max_tokens: tokens in a chunk, at most; one if it is 0.

  Returns:
    The last carry, and results joined to [T, ...].
  """
  num_tokens = jax.tree.leaves(arrays)[0].shape[0]
  size = max(1, min(num_tokens, max_tokens))
  num_chunks = math.ceil(num_tokens / size)
  size = math.ceil(num_tokens / num_chunks)

  def cut(x: jax.Array):
    x = pad(x, num_chunks * size, axis=0)
    return x.reshape(num_chunks, size, *x.shape[1:])

  carry, results = jax.lax.scan(pool, carry, jax.tree.map(cut, arrays))
  return carry, jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[2:])[:num_tokens], results
  )
