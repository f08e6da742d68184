# SPDX-License-Identifier: Apache-2.0
"""What writes in slots: a language model, perhaps with a picture in sight.

A picture stands before a text, whose first rows are then its patches
('prefix'), or beside it, and is read in layers of its own ('co_attention').
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse.config import ModelConfig, MultiModalConfig
from jaxsparse.nn import transformer
from jaxsparse.nn.block import Cache
from jaxsparse.nn.multimodal import MultiModalEncoder, captions
from jaxsparse.nn.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class SlotModel:
  """A model and its cache.

  Attributes:
    config: of the text.
    settings: of pictures; None for text alone.
  """

  config: ModelConfig
  settings: MultiModalConfig | None = None

  @property
  def stands_beside(self) -> bool:
    """Whether a picture is no part of the sequence."""
    settings = self.settings
    return settings is not None and settings.fusion_type == 'co_attention'

  @property
  def rows_before(self) -> int:
    """Rows of a sequence that its picture takes."""
    if self.settings is None or self.stands_beside:
      return 0
    return self.settings.vision.num_patches

  def init_cache(self, num_slots: int, num_rows: int) -> Cache:
    sizes = num_slots, num_rows, True
    if self.settings is None or not self.stands_beside:
      return transformer.init_cache(self.config, *sizes)
    return captions.init_cache(self.config, self.settings, *sizes)

  def apply(self, variables: dict, *args: Any, **how: Any) -> Any:
    """`Transformer.apply`."""
    if not self.stands_beside:
      return Transformer(self.config).apply(variables, *args, **how)
    return self._encoder.apply(variables, *args, method=captions.go_on, **how)

  def see(
    self, params: dict, of_picture: dict, picture: jax.Array, cache: Cache
  ) -> Cache:
    """One slot that has read nothing, with a picture [1, S, S, 3].

    Args:
      params: of what writes; of a picture beside the text of all.
      of_picture: of all but the text, where these are not among them.
      picture: as the encoder takes it.
      cache: of the slot.
    """
    variables = {'params': params if self.stands_beside else of_picture}
    run = functools.partial(self._encoder.apply, variables)
    if self.stands_beside:
      return run(picture, cache, method=captions.see)
    inputs = run(run(picture, method='encode_image'), method='image_inputs')
    ones = jnp.ones(inputs.shape[:2], jnp.int32)
    # All patches see each other, so they are read at once.
    _, cache, _ = self.apply(
      {'params': params},
      jnp.zeros_like(ones),
      jnp.cumsum(ones, axis=1) - 1,
      ones,
      cache,
      logits_at=jnp.zeros(1, jnp.int32),
      inputs=inputs,
      is_input=ones > 0,
      span_ids=ones,
    )
    return cache

  @property
  def _encoder(self) -> MultiModalEncoder:
    return MultiModalEncoder(config=self.settings, model=self.config)
