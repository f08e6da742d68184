# SPDX-License-Identifier: Apache-2.0
"""Attention of one token for each sequence with its cache, as a Triton kernel.

Scores, softmax and sums of values in one pass over keys and values: XLA makes
five kernels of it, which write the scores and read them again. A cache's rows
are divided among programs, which keeps a GPU busy with a small batch, and the
parts are merged afterwards (flash-decoding, Dao et al. 2023). Rows behind a
sequence's last one are not visited.

Letters: B batch, S rows, K key/value heads, G query heads of each, H width.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from jaxsparse.ops.kernels.tile_product import dot
from jaxsparse.ops.quantized_rows import QuantizedRows, dtype_of_sums

# Rows at once, and programs that a GPU should have at least.
_ROWS, _PROGRAMS = 64, 512
# Rows of a product at least, for tensor cores.
_LEAST = 16
# Scores of rows that are not seen: finite, as differences of them are taken.
_NEVER = -1e30


def decode_attention(
  query: Float[Array, 'B K G H'],
  key: Float[Array, 'B K S H'] | QuantizedRows,
  value: Float[Array, 'B K S H'] | QuantizedRows,
  query_positions: Int[Array, 'B'],
  key_positions: Int[Array, 'B S'],
  query_segments: Int[Array, 'B'],
  key_segments: Int[Array, 'B S'],
  *,
  window: int = 0,
  interpret: bool = False,
) -> Float[Array, 'B K G H']:
  """`ops.attention.dense.attention` of one query, without a gradient.

  Args:
    query: in the compute dtype, as are key and value unless quantized.
    key: a head's rows next to each other; codes are read as they are.
    value: as `key`.
    query_positions: position of each query in its document.
    key_positions: position of each row.
    query_segments: document of each query; 0 for padding.
    key_segments: document of each row; 0 for padding and unused rows.
    window: positions that a query sees, its own among them; 0 for all.
    interpret: run in Pallas interpret mode (tests).

  Returns:
    Sums of the values; 0 for a query that sees no row.
  """
  batch, num_heads, num_rows, width = key.shape
  group = query.shape[2]
  num_queries = max(_LEAST, pl.next_power_of_2(group))
  padded = max(_LEAST, pl.next_power_of_2(width))
  num_blocks = pl.cdiv(num_rows, _ROWS)
  num_parts = min(num_blocks, pl.cdiv(_PROGRAMS, batch * num_heads))
  per_part = pl.cdiv(num_blocks, num_parts)
  num_parts = pl.cdiv(num_blocks, per_part)
  # All layers of a model share it.
  row = jnp.arange(1, num_rows + 1, dtype=jnp.int32)[None]
  lengths = jnp.where(key_segments > 0, row, 0).max(1)

  def kernel(
    query_ref: jax.Ref,
    keys: jax.Ref | QuantizedRows,
    values: jax.Ref | QuantizedRows,
    own_position: jax.Ref,
    positions: jax.Ref,
    own_segment: jax.Ref,
    segments: jax.Ref,
    lengths: jax.Ref,
    out: jax.Ref,
    maximum_ref: jax.Ref,
    total_ref: jax.Ref,
  ):
    b, head, part = (pl.program_id(i) for i in range(3))
    # Not as slices, which JAX refuses where they reach beyond the end.
    queries, columns = (
      jnp.arange(num_queries)[:, None],
      jnp.arange(padded)[None],
    )
    in_group, in_width = queries < group, columns < width
    q = triton.load(
      query_ref.at[b, head, queries, columns], mask=in_group & in_width, other=0
    )
    position, segment = own_position[b], own_segment[b]

    def add(i: Int[Array, ''], carry: tuple[jax.Array, jax.Array, jax.Array]):
      maximum, total, sums = carry
      first = (part * per_part + i) * _ROWS
      rows = first + jnp.arange(_ROWS)
      is_row = rows < num_rows

      def load(heads: jax.Ref | QuantizedRows, dtype: jax.typing.DTypeLike):
        """Rows [_ROWS, width], codes in a type, and their scales or 1."""
        is_quantized = isinstance(heads, QuantizedRows)
        x = triton.load(
          (heads.codes if is_quantized else heads).at[
            b, head, rows[:, None], columns
          ],
          mask=is_row[:, None] & in_width,
          other=0,
        )
        if not is_quantized:
          return x, 1
        scale = triton.load(heads.scale.at[b, head, rows], mask=is_row, other=0)
        return x.astype(dtype), scale[None]

      of_rows = triton.load(segments.at[b, rows], mask=is_row, other=0)
      at_rows = triton.load(positions.at[b, rows], mask=is_row, other=0)
      distance = position - at_rows
      is_seen = (of_rows == segment) & (of_rows > 0) & (distance >= 0)
      if window:
        is_seen &= distance < window
      key, key_scale = load(keys, q.dtype)
      scores = dot(q, key, is_transposed=True) * width**-0.5 * key_scale
      scores = jnp.where(is_seen[None], scores, _NEVER)
      highest = jnp.maximum(maximum, scores.max(1))
      shares = jnp.where(is_seen[None], jnp.exp(scores - highest[:, None]), 0)
      before = jnp.exp(maximum - highest)
      value, value_scale = load(values, dtype_of_sums(q.dtype))
      weights = (shares * value_scale).astype(value.dtype)
      sums = sums * before[:, None] + dot(weights, value)
      return highest, total * before + shares.sum(1), sums

    start = (
      jnp.full(num_queries, _NEVER, jnp.float32),
      jnp.zeros(num_queries, jnp.float32),
      jnp.zeros((num_queries, padded), jnp.float32),
    )
    in_use = pl.cdiv(lengths[b], _ROWS) - part * per_part
    in_use = jnp.clip(in_use, 0, per_part)
    maximum, total, sums = jax.lax.fori_loop(0, in_use, add, start)
    triton.store(
      out.at[b, head, part, queries, columns], sums, mask=in_group & in_width
    )
    place, in_group = (b, head, part, jnp.arange(num_queries)), in_group[:, 0]
    triton.store(maximum_ref.at[place], maximum, mask=in_group)
    triton.store(total_ref.at[place], total, mask=in_group)

  parts = (batch, num_heads, num_parts, group)
  mat = jax.typeof(query).manual_axis_type
  sums, maximum, total = pl.pallas_call(
    kernel,
    grid=(batch, num_heads, num_parts),
    out_shape=[
      jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=mat)
      for shape in ((*parts, width), parts, parts)
    ],
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name='decode_attention',
  )(
    query, key, value, query_positions, key_positions, query_segments,
    key_segments, lengths,
  )  # fmt: skip
  scale = jnp.exp(maximum - maximum.max(2, keepdims=True))
  total = (scale * total).sum(2)[..., None]
  y = (scale[..., None] * sums).sum(2) / jnp.where(total > 0, total, 1)
  return y.astype(query.dtype)
