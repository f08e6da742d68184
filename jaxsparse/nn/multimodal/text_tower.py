# SPDX-License-Identifier: Apache-2.0
"""A language model's states beside its logits."""

import flax.linen as nn
from jaxtyping import Array, Bool, Float, Int, Num

from jaxsparse.config.errors import require
from jaxsparse.nn.door import portable
from jaxsparse.nn.layers import Metrics
from jaxsparse.nn.leading import Leading
from jaxsparse.nn.stream import check_split
from jaxsparse.nn.transformer import Transformer


class TextTower(Transformer):
  """A `Transformer` with the same parameters, which returns its states.

  So a language model's parameters are a text tower's, and the other way around.
  """

  @nn.compact
  @portable(
    returns=('tokens', 'tokens', 'alike'),
    has_width=False,
    takes_any_batch=False,
  )
  def __call__(
    self,
    tokens: Num[Array, '*S'],
    positions: Int[Array, '*S'] | None = None,
    segment_ids: Int[Array, '*S'] | None = None,
    deterministic: bool = True,
    inputs: Float[Array, '*S D'] | None = None,
    is_input: Bool[Array, '*S'] | None = None,
    span_ids: Int[Array, '*S'] | None = None,
    has_logits: bool = False,
    states: Float[Array, '*S D'] | None = None,
  ) -> tuple[Float[Array, '*S D'], Float[Array, '*S V'] | None, Metrics]:
    """States [*S, D] after the last norm, logits or None, and metrics.

    Args:
      tokens: as `Transformer` takes them, and as all that follows.
      positions: likewise.
      segment_ids: likewise.
      deterministic: likewise.
      inputs: likewise.
      is_input: likewise.
      span_ids: likewise.
      has_logits: whether logits are wanted.
      states: what stands in the place of all that the blocks would make of the
        tokens; only logits are then made.
    """
    config = self.config
    require(
      config.vocab_size > 0,
      'vocab_size of the text must be set before the model is built, got 0.',
    )
    lead = Leading.of_tokens(tokens)
    positions, segment_ids = lead.places(positions, segment_ids)
    embed, metrics = self._embed(), {}
    if states is None:
      of_tokens = (tokens, positions, segment_ids)
      of_tokens = [lead.flat(x) for x in of_tokens]
      check_split(config, len(of_tokens[0]))
      x, _, metrics = self._states(
        embed,
        *of_tokens,
        None,
        deterministic,
        lead.flat(inputs, 'inputs'),
        lead.flat(is_input, 'is_input'),
        lead.flat(span_ids, 'span_ids'),
      )
      x = self._final_norm(x)
    else:
      x = lead.flat(states, 'states')
    logits = lead.restored(self._head(embed, x)) if has_logits else None
    return lead.restored(x), logits, lead.metrics(metrics)
