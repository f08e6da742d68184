# SPDX-License-Identifier: Apache-2.0
"""A decode step's attention from its products on, as one Triton kernel.

Queries and keys are rotated, the new row enters the cache in place, and
attention of one token follows: around `decode_attention` XLA makes four more
kernels of it, which write what the next one reads. A program has a head's rows
or some of them; the one that has the new row writes it, and takes it from
registers, as no other may see it yet. Rows before a sequence's first and after
its last are not visited.

Letters: B batch, S rows, N heads, K key/value heads, G query heads of each, H
width.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.ops.attention.dense import attention_reference
from jaxsparse.ops.kernels import probe
from jaxsparse.ops.kernels.tile_product import dot

# Rows at once, and programs that a GPU should have at least.
_ROWS, _PROGRAMS = 64, 512
# Rows and columns of a product at least, for tensor cores.
_LEAST = 16
# Scores of rows that are not seen: finite, as differences of them are taken.
_NEVER = -1e30

# An array, or what it is to be.
Shape = Array | jax.ShapeDtypeStruct

Result = tuple[
  Float[Array, 'B NH'], Float[Array, 'B K S H'], Float[Array, 'B K S H']
]


def unsupported_reason(
  qkv: Float[Shape, 'B NH_2KH'],
  frequency: Float[Shape, 'h'],
  key: Float[Shape, 'B K S H'],
  value: Float[Shape, 'B K S H'],
  index: Int[Shape, 'B'],
  position: Int[Shape, 'B'],
  num_heads: int,
) -> str | None:
  """What keeps the kernel from serving such a call here, in words."""
  if qkv.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
    return f'it takes 16 or 32 bits and not {qkv.dtype}'
  if key.dtype != qkv.dtype:
    return f'it has rows of {key.dtype} for {qkv.dtype}'
  if key.shape[3] % 2:
    return f'heads of {key.shape[3]} have no halves to rotate'
  arrays = qkv, frequency, key, value, index, position
  return probe.unsupported_reason(attend, *arrays, num_heads=num_heads)


def attend(
  qkv: Float[Array, 'B NH_2KH'],
  frequency: Float[Array, 'h'],
  key: Float[Array, 'B K S H'],
  value: Float[Array, 'B K S H'],
  index: Int[Array, 'B'],
  position: Int[Array, 'B'],
  num_heads: int,
  *,
  interpret: bool = False,
) -> Result:
  """`attend_reference` on a GPU, without a gradient; the cache is in place.

  Args:
    qkv: queries of all heads, keys and values, as products leave them.
    frequency: radians a position of each pair of a head, `rope.frequencies`.
    key: rotated rows of the cache, a head's next to each other. The new ones
      are written to the same memory where the caller donates it.
    value: as `key`.
    index: row of each sequence's new token; from beyond the last one the last
      is taken.
    position: how many rows before that a sequence sees.
    num_heads: of queries, N.
    interpret: run in Pallas interpret mode (tests).

  Returns:
    Sums of the values, and both caches with the new rows.
  """
  batch, num_kv_heads, num_rows, width = key.shape
  group, half = num_heads // num_kv_heads, width // 2
  num_queries = max(_LEAST, pl.next_power_of_2(group))
  padded_half = max(_LEAST, pl.next_power_of_2(half))
  padded = max(_LEAST, pl.next_power_of_2(width))
  num_blocks = pl.cdiv(num_rows, _ROWS)
  num_parts = min(num_blocks, max(1, _PROGRAMS // (batch * num_kv_heads)))
  per_part = pl.cdiv(num_blocks, num_parts)
  num_parts = pl.cdiv(num_blocks, per_part)

  def kernel(
    qkv_ref: jax.Ref,
    frequency_ref: jax.Ref,
    keys: jax.Ref,
    values: jax.Ref,
    index_ref: jax.Ref,
    position_ref: jax.Ref,
    out: jax.Ref,
    maximum_ref: jax.Ref,
    total_ref: jax.Ref,
    new_keys: jax.Ref,
    new_values: jax.Ref,
  ):
    b, head, part = (pl.program_id(i) for i in range(3))
    row = jnp.minimum(index_ref[b], num_rows - 1)
    first = jnp.maximum(row - position_ref[b], 0)
    query = jnp.arange(num_queries)[:, None]
    in_group = query < group
    half_lane, lane = jnp.arange(padded_half), jnp.arange(padded)
    in_half, in_width = half_lane < half, lane < width
    place = frequency_ref.at[half_lane]
    angle = triton.load(place, mask=in_half, other=0)
    angle *= position_ref[b].astype(jnp.float32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)

    def rotated(begin: Int[Array, 'n 1'], mask: Bool[Array, 'n 1'] | bool):
      """Both halves [n, h] of heads that begin at columns of the product."""
      left, right = (
        triton.load(
          qkv_ref.at[b, begin + offset + half_lane[None]],
          mask=in_half[None] & mask,
          other=0,
        ).astype(jnp.float32)
        for offset in (0, half)
      )
      halves = (
        left * cos[None] - right * sin[None],
        right * cos[None] + left * sin[None],
      )
      return [x.astype(qkv.dtype) for x in halves]

    q = rotated((head * group + query) * width, in_group)
    begin = (num_heads + head) * width
    new_key = rotated(jnp.full((1, 1), begin), True)
    begin += num_kv_heads * width
    new_value = triton.load(qkv_ref.at[b, begin + lane], mask=in_width, other=0)

    @pl.when(row // _ROWS // per_part == part)
    def _():
      for offset, x in zip((0, half), new_key, strict=True):
        triton.store(
          new_keys.at[b, head, row, offset + half_lane],
          x.reshape(-1),
          mask=in_half,
        )
      triton.store(new_values.at[b, head, row, lane], new_value, mask=in_width)

    def add(i: Int[Array, ''], carry: tuple[jax.Array, jax.Array, jax.Array]):
      maximum, total, sums = carry
      rows = (part * per_part + i) * _ROWS + jnp.arange(_ROWS)
      is_old, is_new = (rows >= first) & (rows < row), (rows == row)[:, None]
      is_seen = (is_old | (rows == row))[None]

      def load(ref: jax.Ref, columns: jax.Array, mask: jax.Array):
        place = ref.at[b, head, rows[:, None], columns[None]]
        return triton.load(place, mask=is_old[:, None] & mask[None], other=0)

      scores = sum(
        dot(
          x,
          jnp.where(is_new, new, load(keys, half_lane + offset, in_half)),
          is_transposed=True,
        )
        for x, new, offset in zip(q, new_key, (0, half), strict=True)
      )
      scores = jnp.where(is_seen, scores * width**-0.5, _NEVER)
      highest = jnp.maximum(maximum, scores.max(1))
      shares = jnp.where(is_seen, jnp.exp(scores - highest[:, None]), 0)
      before = jnp.exp(maximum - highest)
      old = load(values, lane, in_width)
      rows_of_values = jnp.where(is_new, new_value[None], old)
      sums = sums * before[:, None] + dot(
        shares.astype(old.dtype), rows_of_values
      )
      return highest, total * before + shares.sum(1), sums

    carry = (
      jnp.full(num_queries, _NEVER, jnp.float32),
      jnp.zeros(num_queries, jnp.float32),
      jnp.zeros((num_queries, padded), jnp.float32),
    )
    begin, end = (
      jnp.clip(block - part * per_part, 0, per_part)
      for block in (first // _ROWS, row // _ROWS + 1)
    )
    maximum, total, sums = jax.lax.fori_loop(begin, end, add, carry)
    if num_parts == 1:
      sums = (sums / total[:, None]).astype(out.dtype)
    mask = in_group & in_width[None]
    place = (b, head, part, query, lane[None])
    triton.store(out.at[place], sums, mask=mask)
    place, in_group = (b, head, part, query[:, 0]), in_group[:, 0]
    triton.store(maximum_ref.at[place], maximum, mask=in_group)
    triton.store(total_ref.at[place], total, mask=in_group)

  parts = (batch, num_kv_heads, num_parts, group)
  mat = jax.typeof(qkv).manual_axis_type

  def of_shape(shape: tuple[int, ...], dtype: jax.typing.DTypeLike):
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=mat)

  sums_dtype = qkv.dtype if num_parts == 1 else jnp.float32
  sums, maximum, total, key, value = pl.pallas_call(
    kernel,
    grid=(batch, num_kv_heads, num_parts),
    out_shape=[
      of_shape((*parts, width), sums_dtype),
      of_shape(parts, jnp.float32),
      of_shape(parts, jnp.float32),
      of_shape(key.shape, key.dtype),
      of_shape(value.shape, value.dtype),
    ],
    input_output_aliases={2: 3, 3: 4},
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name='attend',
  )(qkv, frequency, key, value, index, position)
  if num_parts > 1:
    scale = jnp.exp(maximum - maximum.max(2, keepdims=True))
    total = (scale * total).sum(2)[..., None]
    sums = (scale[..., None] * sums).sum(2) / total
  return sums.reshape(batch, -1).astype(qkv.dtype), key, value


def attend_reference(
  qkv: Float[Array, 'B NH_2KH'],
  frequency: Float[Array, 'h'],
  key: Float[Array, 'B K S H'],
  value: Float[Array, 'B K S H'],
  index: Int[Array, 'B'],
  position: Int[Array, 'B'],
  num_heads: int,
) -> Result:
  """The same step by step."""
  batch, num_kv_heads, num_rows, width = key.shape
  heads = qkv.reshape(batch, 1, -1, width)
  query, new_key, new_value = jnp.split(
    heads, [num_heads, num_heads + num_kv_heads], axis=2
  )

  def rotated(x: Float[Array, 'B 1 n H']):
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    angle = position[:, None].astype(jnp.float32) * frequency[None]
    c, s = (f(angle)[:, None, None] for f in (jnp.cos, jnp.sin))
    halves = left * c - right * s, right * c + left * s
    return jnp.concatenate(halves, axis=-1).astype(x.dtype)

  index = jnp.minimum(index, num_rows - 1)
  start = jnp.maximum(index - position, 0)
  row = jnp.arange(num_rows, dtype=jnp.int32)[None]
  is_new = (row == index[:, None])[:, None, :, None]
  key = jnp.where(is_new, rotated(new_key).swapaxes(1, 2), key)
  value = jnp.where(is_new, new_value.swapaxes(1, 2), value)
  y = attention_reference(
    rotated(query),
    key.swapaxes(1, 2),
    value.swapaxes(1, 2),
    index[:, None],
    jnp.broadcast_to(row, (batch, num_rows)),
    jnp.ones((batch, 1), jnp.int32),
    (row >= start[:, None]).astype(jnp.int32),
  )
  return y.reshape(batch, -1).astype(qkv.dtype), key, value
