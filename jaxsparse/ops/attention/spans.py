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


def reach_of_spans(
  span_ids: Int[Array, 'B T'],
  positions: Int[Array, 'B T'],
  segment_ids: Int[Array, 'B T'],
) -> Int[Array, 'B T']:
  """The last position that each one sees: its own, or its span's last one.

  Args:
    span_ids: neighbours of one document with the same number above 0 are a
      span; 0 is causal.
    positions: of each in its document, one more from row to row of a span.
    segment_ids: documents.
  """
  length = span_ids.shape[1]
  row = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), span_ids.shape)

  def next_of(x: Int[Array, 'B T']):
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))

  goes_on = (span_ids > 0) & (span_ids == next_of(span_ids))
  goes_on &= segment_ids == next_of(segment_ids)
  # Of each row the next one at which a span ends, or its own.
  end = jax.lax.cummin(jnp.where(goes_on, length, row), axis=1, reverse=True)
  return positions + end - row


def reach_reference(
  span_ids: Int[Array, 'B T'],
  positions: Int[Array, 'B T'],
  segment_ids: Int[Array, 'B T'],
) -> list[list[int]]:
  """The same, row by row; tests only."""
  found = []
  for spans, places, documents in zip(
    span_ids.tolist(), positions.tolist(), segment_ids.tolist(), strict=True
  ):
    reach = []
    for i, span in enumerate(spans):
      last = i
      while (
        span
        and last + 1 < len(spans)
        and (spans[last + 1], documents[last + 1]) == (span, documents[i])
      ):
        last += 1
      reach.append(places[i] + last - i)
    found.append(reach)
  return found
