# SPDX-License-Identifier: Apache-2.0
"""Which frames of a video are read with a text.

A frame is a block of keys, its patches, and the text chooses among them as a
tile of queries does in sparse attention: by products with each block's mean key
(`block_selection`). What is not chosen is not read. Two baselines choose
without the text.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.ops.sparse_attention.block_selection import importance, select
from jaxsparse.ops.sparse_attention.block_summaries import Summaries
from jaxsparse.ops.sparse_attention.sparse_inputs import SparseOptions


class FrameChoice(NamedTuple):
  """The frames that are read, k of F."""

  # Their numbers, the most important one first.
  frame: Int[Array, 'B k']
  # Those of them that are read; others fill up the k.
  is_read: Bool[Array, 'B k']
  # Factors of their values, of mean 1; of a routed choice by importance.
  gate: Float[Array, 'B k']
  # Importance of each frame, of sum 1; 0 for those that are not there.
  shares: Float[Array, 'B F']


def routed(
  query: Float[Array, 'B N H'],
  key: Float[Array, 'B F H'],
  is_there: Bool[Array, 'B F'],
  num_read: int,
  coverage: float = 1.0,
) -> FrameChoice:
  """The frames that a text asks for, those of equal shares in their order.

  A gate is a frame's importance among those that are read, times their number,
  as the gates of experts are (Mixtral, arXiv:2401.04088). So a frame whose
  values lower the loss more than the others' gets a larger share: with all of
  them read all are compared, with one nothing is.

  Args:
    query: of the text, in N heads.
    key: of each frame, the mean of its patches'.
    is_there: frames that may be read.
    num_read: k, the most that are.
    coverage: frames are read, by descending share, until those before cover so
      much; 1 reads k.
  """
  shares = _importance(query, key, is_there)
  options = SparseOptions(
    block=1, tile=1, window_blocks=0, max_blocks=num_read, sinks=0
  )
  covered = jnp.inf if coverage == 1 else coverage
  chosen = select(
    jax.lax.stop_gradient(shares)[:, None, None],
    is_there[:, None],
    jnp.full((len(key), 1, 1), covered),
    options,
  )
  frame, is_read = chosen.block[:, 0, 0], chosen.is_kept[:, 0, 0]
  kept = jnp.take_along_axis(key, frame[..., None], axis=1)
  gate = _importance(query, kept, is_read)
  gate *= is_read.sum(-1, keepdims=True)
  return FrameChoice(frame, is_read, gate, shares)


def _importance(query, key, is_there):
  """Of sum 1, or 0 where no frame is there, [B, F]."""
  segments = is_there.astype(jnp.int32)
  summaries = Summaries(key[:, None], key[:, None], segments, segments)
  shares = importance(query[:, None, None], summaries, is_there[:, None])
  return shares[:, 0, 0]


def uniform(is_there: Bool[Array, 'B F'], num_read: int) -> FrameChoice:
  """Every n-th frame, each from the middle of its part."""
  batch, num_frames = is_there.shape
  at = (jnp.arange(num_read) * num_frames + num_frames // 2) // num_read
  return _unrouted(jnp.broadcast_to(at, (batch, num_read)), is_there)


def change(
  frames: Float[Array, 'B F E'], is_there: Bool[Array, 'B F'], num_read: int
) -> FrameChoice:
  """The frames that differ most from the one before, and the first one.

  Args:
    frames: what each shows, such as the mean of its patches.
    is_there: frames that may be read.
    num_read: k.
  """
  step = jnp.linalg.norm(frames[:, 1:] - frames[:, :-1], axis=-1)
  step = jnp.pad(step, ((0, 0), (1, 0)), constant_values=jnp.inf)
  _, at = jax.lax.top_k(jnp.where(is_there, step, -1.0), num_read)
  return _unrouted(at, is_there)


def _unrouted(at: Int[Array, 'B k'], is_there: Bool[Array, 'B F']):
  shares = is_there / jnp.maximum(is_there.sum(-1, keepdims=True), 1)
  is_read = jnp.take_along_axis(is_there, at, axis=1)
  return FrameChoice(
    at.astype(jnp.int32), is_read, jnp.ones(at.shape, jnp.float32), shares
  )


def read_frames(
  choice: FrameChoice,
  frames: Float[Array, 'B F L E'],
  segment_ids: Int[Array, 'B F L'],
) -> tuple[Float[Array, 'B S E'], Int[Array, 'B S'], Float[Array, 'B S']]:
  """Patches of the chosen frames alone, their segments, and their gates."""
  batch, _, length, width = frames.shape
  flat = batch, choice.frame.shape[1] * length
  index = choice.frame[:, :, None]
  kept = jnp.take_along_axis(frames, index[..., None], axis=1)
  ids = jnp.take_along_axis(segment_ids, index, axis=1)
  ids = jnp.where(choice.is_read[..., None], ids, 0)
  gate = jnp.broadcast_to(choice.gate[..., None], ids.shape)
  return kept.reshape(*flat, width), ids.reshape(flat), gate.reshape(flat)
