# SPDX-License-Identifier: Apache-2.0
"""What a memory layer's query convolution looks back to, and the convolution.

While decoding, a sequence's last inputs are a ring: that of index i in entry i
mod their number. A single token writes its own and reads all as they lie, so
that nothing is moved.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.ops.attention import slot_rows


class Ring(NamedTuple):
  """The inputs that one position sees, its own among them, in any order.

  Attributes:
    inputs: [B, n, D].
    ages: how many positions before it each is, n for none that it sees.
  """

  inputs: Float[Array, 'B n D']
  ages: Int[Array, 'B n']


# The inputs before the first position, and their segment ids; or a ring.
Context = tuple[Float[Array, '*C S D'], Int[Array, '*C S']]


def init_ring(
  batch_size: int, num_taps: int, width: int, dtype: jax.typing.DTypeLike
) -> Float[Array, 'B n D']:
  """An empty ring of as many entries as the convolution has taps."""
  ring = jnp.zeros((batch_size, num_taps, width), dtype)
  return mesh.reshard(ring, mesh.act('BTD'))


def look_back(
  ring: Float[Array, 'B n D'],
  x: Float[Array, 'B T D'],
  index: Int[Array, '*one_or_B'],
  positions: Int[Array, 'B T'],
  segment_ids: Int[Array, 'B T'],
) -> tuple[Context, Float[Array, 'B n D']]:
  """What new inputs look back to, and the ring with them.

  An input of its own document is as many inputs ago as positions.

  Args:
    ring: as it was.
    x: the new inputs.
    index: of the first of them, of all sequences or of each.
    positions: in their documents.
    segment_ids: documents; 0 for padding, which with an index of each sequence
      comes last and leaves nothing behind.
  """
  num = ring.shape[1]
  if x.shape[1] == 1:
    at = index % num
    write = functools.partial(slot_rows.write_all, axis=1)
    if at.ndim:
      write = functools.partial(slot_rows.write_rows, axis=1)
      write = mesh.over_tokens(write)
    ring = write(ring, x.astype(ring.dtype), at)
    entries = jnp.arange(num, dtype=jnp.int32)[None]
    ages = (at.reshape(-1, 1) - entries) % num
    is_seen = ages <= positions
    return Ring(ring, jnp.where(is_seen, ages, num)), ring
  if index.ndim:
    roll = functools.partial(slot_rows.roll_rings, axis=1)
    count = slot_rows.num_tokens(segment_ids)
    seen, ring = mesh.over_tokens(roll)(ring, x, index, count)
  else:
    seen, ring = slot_rows.roll_all(ring, x, index, 1)
  ages = jnp.arange(num - 1, 0, -1, dtype=jnp.int32)[None]
  is_seen = ages <= positions[:, :1]
  return (seen[:, 1:num], jnp.where(is_seen, segment_ids[:, :1], -1)), ring


def convolve(
  x: Float[Array, 'B T D'],
  kernel: Float[Array, 'taps D'],
  segment_ids: Int[Array, 'B T'] | None,
  context: Context | None,
) -> Float[Array, 'B T D']:
  """Causal depth-wise convolution over time, within a document.

  kernel[i] weighs the input i positions back. Inputs of other documents count
  as zero.
  """
  if isinstance(context, Ring):
    return _convolve_ring(kernel, context)
  num_taps, num_positions = kernel.shape[0], x.shape[1]
  past = num_taps - 1
  if context is None:
    inputs = jnp.pad(x, ((0, 0), (past, 0), (0, 0)))
    if segment_ids is not None:
      segments = jnp.pad(segment_ids, ((0, 0), (past, 0)))
  else:
    inputs = jnp.concatenate([context[0].astype(x.dtype), x], axis=1)
    if segment_ids is not None:
      segments = jnp.concatenate([context[1], segment_ids], axis=1)
  y = jnp.zeros_like(x)
  for i in range(num_taps):
    window = slice(past - i, past - i + num_positions)
    earlier = inputs[:, window]
    if segment_ids is not None:
      is_same = segments[:, window] == segment_ids
      earlier = jnp.where(is_same[..., None], earlier, 0)
    y += kernel[i][None, None] * earlier
  return y


def _convolve_ring(kernel, ring):
  """Of one position [B, 1, D]."""
  y = jnp.zeros_like(ring.inputs[:, 0])
  for entry in range(len(kernel)):
    age = ring.ages[:, entry]
    # What is not seen is multiplied by nothing, whatever it is.
    factor = kernel.at[age].get(mode='clip', out_sharding=mesh.act('B.'))
    is_seen = (age < len(kernel))[:, None]
    y += jnp.where(is_seen, factor * ring.inputs[:, entry], 0)
  return y[:, None]
