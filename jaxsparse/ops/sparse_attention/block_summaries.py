"""One key and one value that stand for a block of rows.

The mean of the rotated keys is the default: its product with a query is the
mean of the query's scores in the block (MoBA, arXiv:2502.13189). Two others:

- The mean of the keys as they were before the rotation, rotated at the mean of
  their positions. Rows of a document have positions in their order, so each
  rotated key is turned on to the middle and nothing else need be known.
- A mean weighted by a softmax over the block's rows. A row's logit is linear in
  its value, which every cache holds, plus a bias for its place in the block (a
  gate for each key/value head, where DeepSeek-V4 has one for each coordinate).

Letters: B batch, K key/value heads, H head width, Z blocks of b rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.ops.online_softmax import masked_softmax

# Rotates keys [..., H] by their rows, which are broadcast over [...].
Turn = Callable[[jax.Array, jax.Array], jax.Array]


class Summaries(NamedTuple):
  """What is known of each block without reading it."""

  # Means over the rows of the block's last document.
  key: Float[Array, 'B K Z H']
  value: Float[Array, 'B K Z H']
  # Their number, and the document.
  count: Int[Array, 'B Z']
  segment: Int[Array, 'B Z']


class Pooling(NamedTuple):
  """What weighs the rows of a block, by their values and their places."""

  weight: Float[Array, 'K H']
  bias: Float[Array, 'K b']


def plain_pooling(num_kv_heads: int) -> Pooling:
  """Of width 0, such that all have the same arrays: all rows weigh the same."""
  return Pooling(jnp.zeros((num_kv_heads, 0)), jnp.zeros((num_kv_heads, 0)))


def summarize(
  key: Float[Array, 'B K Z b H'],
  value: Float[Array, 'B K Z b H'],
  segments: Int[Array, 'B Z b'],
  pooling: Pooling | None = None,
  turn: Turn | None = None,
) -> Summaries:
  """Summaries of all blocks, in f32 at least.

  Only the last document of a block can go on after it, so the summary is that
  one's; segment 0 is padding.

  Args:
    key: rotated by their positions.
    value: as `key`.
    segments: document of each row.
    pooling: weighs the rows; without one, or by one of width 0, all the same.
    turn: rotates keys to the middle of their rows before they are pooled.
  """
  is_own, count = _own_rows(segments)
  dtype = jnp.promote_types(key.dtype, jnp.float32)
  key, value = key.astype(dtype), value.astype(dtype)
  share = is_own / jnp.maximum(count, 1)[..., None].astype(dtype)
  if turn is not None:
    row = jnp.arange(segments.shape[-1], dtype=dtype)
    middle = jnp.einsum('bzs,s->bz', share, row)[..., None]
    key = turn(key, (middle - row[None, None])[:, None])
  rows = 'bzs'
  if pooling is not None and pooling.bias.shape[-1]:
    rows = 'bkzs'
    logits = jnp.einsum('bkzsh,kh->bkzs', value, pooling.weight.astype(dtype))
    logits += pooling.bias.astype(dtype)[None, :, None]
    share = masked_softmax(logits, is_own[:, None])
  key, value = (
    jnp.einsum(f'bkzsh,{rows}->bkzh', x, share) for x in (key, value)
  )
  return Summaries(key, value, count.astype(jnp.int32), segments[..., -1])


def _own_rows(segments):
  """Which rows are of their block's last document, and their number."""
  last = segments[..., -1]
  is_own = (segments == last[..., None]) & (last > 0)[..., None]
  return is_own, is_own.sum(-1)


def mean_of_blocks(
  rows: Float[Array, 'B S I'], segments: Int[Array, 'B Z b']
) -> Float[Array, 'B Z I']:
  """Means over the same rows as those of `summarize`, in f32 at least."""
  is_own, count = _own_rows(segments)
  dtype = jnp.promote_types(rows.dtype, jnp.float32)
  share = is_own / jnp.maximum(count, 1)[..., None].astype(dtype)
  on_grid = rows.reshape(*segments.shape, rows.shape[-1])
  return jnp.einsum('bzsi,bzs->bzi', on_grid.astype(dtype), share)


def join_summaries(first: Summaries, second: Summaries) -> Summaries:
  """The blocks of both, one after the other."""
  pairs = zip(first, second, (2, 2, 1, 1), strict=True)
  return Summaries(*(jnp.concatenate(pair, axis) for *pair, axis in pairs))
