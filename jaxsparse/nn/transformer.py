# SPDX-License-Identifier: Apache-2.0
"""The language model: an embedding, a stream of blocks, and logits."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import UserError, require
from jaxsparse.config.model import block_name
from jaxsparse.nn.attention import cache as attention_cache
from jaxsparse.nn.block import Cache, placements
from jaxsparse.nn.door import portable
from jaxsparse.nn.layers import (
  NORMS,
  Embed,
  Metrics,
  init_variances,
  project_to_vocabulary,
  weight,
)
from jaxsparse.nn.leading import Leading
from jaxsparse.nn.memory.context import init_ring
from jaxsparse.nn.stream import check_split, run_blocks
from jaxsparse.ops.attention.spans import reach_of_spans


def init_cache(
  config: ModelConfig, batch_size: int, length: int, has_slots: bool = False
) -> Cache:
  """An empty decoding cache with room for `length` tokens of each sequence.

  Prompts of unequal length are padded on the left with segment id 0; rows are
  written in the order in which tokens are fed, at one index for the batch but
  for sparse attention, whose rows begin with the first token.

  With slots each sequence has its own index: of what is fed at once its tokens
  come first, then padding, which leaves nothing behind. Rows of padding must
  fit, too. A sequence of padding alone stays as it is. See `bounded_slots` for
  histories of bounded size.

  Raises:
    UserError: a size does not fit the mesh, or the stream is not causal.
  """
  require(
    config.is_causal,
    'a decoding cache is of causal streams, but model.is_causal is False.',
  )
  check_split(config, batch_size)
  blocks: dict[str, dict[str, Any]] = {
    block_name(i): dict(
      attention=attention_cache.init_rows(config, i, batch_size, length)
    )
    for i in range(config.num_layers)
  }
  for read, _ in placements(config):
    if config.memory and config.memory.query_conv_taps > 1:
      blocks[block_name(read)]['memory'] = init_ring(
        batch_size,
        config.memory.query_conv_taps,
        config.model_dim,
        config.dtype,
      )
  shared = attention_cache.init_shared(config, batch_size, length, has_slots)
  return dict(shared=shared, blocks=blocks)


def init_params(config: ModelConfig, key: jax.Array) -> Any:
  """Drawn parameters, laid as the mesh in use wants them."""
  # Divisible however tokens are split.
  tokens = jnp.ones((mesh.num_token_shards(), 1), jnp.int32)
  return Transformer(config).init(key, tokens)['params']


class Transformer(nn.Module):
  """Decoder-only language model; its blocks are `block_00`, `block_01`, ...

  Attributes:
    config: of the model.
    axes: names of the mesh axes of a program of your own, see `mesh.Axes`. On
      such a mesh tables and experts are split, and all else is whole on each
      device: tensor parallelism is for our own mesh (`mesh.make_mesh`).
  """

  config: ModelConfig
  axes: mesh.Axes = mesh.DEFAULT_AXES

  @nn.compact
  @portable(
    returns=('tokens', 'cache', 'alike'),
    has_width=False,
    takes_any_batch=False,
  )
  def __call__(
    self,
    tokens: Num[Array, '*S'],
    positions: Int[Array, '*S'] | None = None,
    segment_ids: Int[Array, '*S'] | None = None,
    cache: Cache | None = None,
    deterministic: bool = True,
    logits_at: Num[Array, '*B'] | None = None,
    inputs: Float[Array, '*S D'] | None = None,
    is_input: Bool[Array, '*S'] | None = None,
    span_ids: Int[Array, '*S'] | None = None,
  ) -> tuple[Float[Array, '... V'], Cache | None, Metrics]:
    """Scores of the token after each of `tokens`.

    Args:
      tokens: the new tokens; the last dimension is that of positions, and the
        cache has one batch of all before it.
      positions: position of each in its document, by default that in its row.
      segment_ids: 0 for padding, 1, 2, ... for the documents of a row, of which
        there is one by default.
      cache: what `init_cache` made and earlier calls returned; None when
        nothing comes before `tokens`.
      deterministic: False for dropout, which needs the rng 'dropout'.
      logits_at: of each sequence the one place in `tokens`, from 0 on, whose
        scores are wanted; by default all. Those of a prompt's other tokens cost
        as much as some blocks. Beyond the last token scores are NaN.
      inputs: what stands in place of the tokens' embeddings where `is_input`,
        such as a picture's patches; the tokens there are of no matter.
      is_input: None where `inputs` is None.
      span_ids: neighbours of one document with the same number above 0 all see
        each other, such as a prefix does; 0 is causal. A span comes in one
        call.

    Returns:
      Logits in float32, with `logits_at` of one position; the extended cache;
      float32 scalars such as 'block_01/memory/usage_kl', and sums over all
      layers: 'aux_loss', and with sparse attention 'sparsity_loss'.

    Raises:
      UserError: a size does not fit the mesh, vocab_size is not set, `tokens`
        are no integers, `logits_at` has another shape than a sequence each, one
        of `inputs` and `is_input` is missing, or there are spans in a stream
        that is not causal or has sparse blocks.
    """
    lead = Leading.of_tokens(tokens)
    num_sequences = 0 if lead.is_empty else math.prod(lead.shape[:-1])
    _check_sizes(self.config, num_sequences)
    positions, segment_ids = lead.places(positions, segment_ids)
    at = lead.flat_at(logits_at, 'logits_at')
    require(
      (inputs is None) == (is_input is None),
      'inputs and is_input say together what stands for tokens: give both.',
    )
    embed = self._embed()
    x, new_cache, metrics = self._states(
      embed,
      lead.flat(tokens, 'tokens'),
      lead.flat(positions, 'positions'),
      lead.flat(segment_ids, 'segment_ids'),
      None if lead.is_empty else cache,
      deterministic,
      lead.flat(inputs, 'inputs'),
      lead.flat(is_input, 'is_input'),
      lead.flat(span_ids, 'span_ids'),
    )
    if logits_at is not None:
      if not lead.is_empty:
        x = mesh.over_tokens(_rows_at)(x, at)
      lead = lead.of_one()
    logits = self._head(embed, self._final_norm(x))
    cache = cache if lead.is_empty else new_cache
    return lead.restored(logits), cache, lead.metrics(metrics)

  def _states(
    self, embed, tokens, positions, segment_ids, cache, deterministic,
    inputs=None, is_input=None, span_ids=None,
  ):  # fmt: skip
    """The stream after its last block, of sequences [B, T]."""
    config = self.config
    tokens, positions, segment_ids = (
      mesh.reshard(array, mesh.act('BT'))
      for array in (tokens, positions, segment_ids)
    )
    x = embed(tokens)
    if inputs is not None and is_input is not None:
      inputs = mesh.reshard(inputs.astype(x.dtype), mesh.act('BTD'))
      x = jnp.where(is_input[..., None], inputs, x)
    reach = None
    if span_ids is not None:
      reach = reach_of_spans(span_ids, positions, segment_ids)
    return run_blocks(
      config, x, positions, segment_ids, cache, deterministic, reach
    )

  def _embed(self):
    config = self.config
    return Embed(
      config.vocab_size, config.model_dim, config.dtype, name='embed'
    )

  def _final_norm(self, x):
    config = self.config
    norm = NORMS[config.norm]
    return norm(config.norm_epsilon, dtype=config.dtype, name='final_norm')(x)

  def _head(self, embed, x):
    config = self.config
    if config.tie_embeddings:
      return embed.logits(x)
    width = config.model_dim
    shape = (config.vocab_size, width)
    variance, _ = init_variances(
      config.init_deviations, width, width, config.num_layers
    )
    table = weight(self, 'output', 'VD', shape, variance, config.dtype)
    return project_to_vocabulary(x, table)


def _rows_at(x: Float[Array, 'B T D'], index: Int[Array, 'B']):
  return jnp.take_along_axis(x, index[:, None, None], axis=1)


def _check_sizes(config: ModelConfig, batch_size: int) -> None:
  if config.vocab_size < 1:
    raise UserError(
      'vocab_size must be set before the model is built, '
      f'got {config.vocab_size}.'
    )
  check_split(config, batch_size)
