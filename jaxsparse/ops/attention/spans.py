# SPDX-License-Identifier: Apache-2.0
"""Spans of a causal sequence whose positions all see each other.

The prefix of a prefix-LM is one (T5, arXiv:1910.10683, section 3.2; PaliGemma,
arXiv:2407.07726), and a picture between a chat's words (Gemma 3,
arXiv:2503.19786). All that such a position has beyond causal attention is a
later last position that it sees, its `reach`. Keys need to know nothing of it:
what a decoding cache holds of a span that was fed whole is all that later
queries read.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsparse import mesh


def reach_of_spans(
  span_ids: Int[Array, 'B T'],
  positions: Int[Array, 'B T'],
  segment_ids: Int[Array, 'B T'],
) -> Int[Array, 'B T']:
  """The last position that each one sees: its own, or its span's last one.

  Args:
    span_ids: neighbours of one document with the same number above 0 are a
      span, whatever padding stands between; 0 is causal.
    positions: of each in its document, in which they rise.
    segment_ids: documents; 0 for padding.
  """
  return mesh.over_tokens(_reach_of_spans)(span_ids, positions, segment_ids)


def _reach_of_spans(span_ids, positions, segment_ids):
  length = span_ids.shape[1]
  row = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), span_ids.shape)
  next_span, next_segment = (
    jnp.pad(x[:, 1:], ((0, 0), (0, 1))) for x in (span_ids, segment_ids)
  )
  goes_on = (span_ids > 0) & (span_ids == next_span)
  goes_on &= (segment_ids == next_segment) | (segment_ids * next_segment == 0)
  # Of each row the next one at which a span ends, or its own.
  end = jax.lax.cummin(jnp.where(goes_on, length, row), axis=1, reverse=True)
  token = jax.lax.cummax(jnp.where(segment_ids > 0, row, 0), axis=1)
  last = jnp.take_along_axis(token, end, axis=1)
  return jnp.take_along_axis(positions, last, axis=1)


def reach_reference(
  span_ids: Int[Array, 'B T'],
  positions: Int[Array, 'B T'],
  segment_ids: Int[Array, 'B T'],
) -> list[list[int]]:
  """The same, row by row, 0 for padding; tests only."""
  found = []
  for spans, places, documents in zip(
    span_ids.tolist(), positions.tolist(), segment_ids.tolist(), strict=True
  ):
    reach = []
    for i, span in enumerate(spans):
      last = at = i
      while span and at + 1 < len(spans) and spans[at + 1] == span:
        at += 1
        if documents[at] not in (0, documents[i]):
          break
        last = at if documents[at] else last
      reach.append(places[last] if documents[i] else 0)
    found.append(reach)
  return found
