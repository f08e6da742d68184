# SPDX-License-Identifier: Apache-2.0
"""A language model's states beside its logits."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from jaxsparse.config.errors import require
from jaxsparse.nn.block import Cache
from jaxsparse.nn.door import portable
from jaxsparse.nn.layers import Metrics
from jaxsparse.nn.leading import Leading
from jaxsparse.nn.multimodal.masks import positions_of
from jaxsparse.nn.stream import check_split
from jaxsparse.nn.transformer import Transformer


class TextTower(Transformer):
  """A `Transformer` with the same parameters, which returns its states.

  So a language model's parameters are a text tower's, and the other way around.
  """

  @nn.compact
  @portable(
    returns=('tokens', 'tokens', 'cache', 'alike'),
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
    cache: Cache | None = None,
  ) -> tuple[
    Float[Array, '*S D'],
    Float[Array, '*S V'] | None,
    Cache | None,
    Metrics,
  ]:
    """States [*S, D] after the last norm, logits, the cache, and metrics.

    Logits are None unless wanted.

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
      cache: likewise, as `init_cache` makes it.
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
      x, cache, metrics = self._states(
        embed,
        *of_tokens,
        cache,
        deterministic,
        lead.flat(inputs, 'inputs'),
        lead.flat(is_input, 'is_input'),
        lead.flat(span_ids, 'span_ids'),
      )
      x = self._final_norm(x)
    else:
      x = lead.flat(states, 'states')
    logits = lead.restored(self._head(embed, x)) if has_logits else None
    return lead.restored(x), logits, cache, lead.metrics(metrics)


def behind_prefix(
  text: Num[Array, 'B T ...'],
  inputs: Float[Array, 'B L D'],
  text_segment_ids: Int[Array, 'B T'],
  input_segment_ids: Int[Array, 'B L'],
) -> dict[str, jax.Array]:
  """What a `TextTower` reads of a text behind inputs that all see each other.

  Args:
    text: tokens, or what stands in place of their embeddings [B, T, D].
    inputs: such as a picture's patches.
    text_segment_ids: 0 for padding.
    input_segment_ids: likewise.

  Returns:
    Its arguments by name, for L + T rows, whose positions leave out padding.
  """
  of_inputs, of_text = input_segment_ids * 0, text_segment_ids * 0
  if jnp.issubdtype(text.dtype, jnp.integer):
    tokens, is_input = text, of_text
    inputs = jnp.pad(inputs, [(0, 0), (0, text.shape[1]), (0, 0)])
  else:
    tokens, is_input = of_text, of_text + 1
    inputs = jnp.concatenate([inputs, text.astype(inputs.dtype)], axis=1)
  tokens, segment_ids, is_input, span_ids = (
    jnp.concatenate(parts, axis=1)
    for parts in (
      (of_inputs, tokens),
      (input_segment_ids, text_segment_ids),
      (of_inputs + 1, is_input),
      (of_inputs + 1, of_text),
    )
  )
  return dict(
    tokens=tokens,
    positions=positions_of(segment_ids),
    segment_ids=segment_ids,
    inputs=inputs,
    is_input=is_input > 0,
    span_ids=span_ids,
  )
