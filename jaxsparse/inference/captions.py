# SPDX-License-Identifier: Apache-2.0
"""Writes what a picture shows, by a text that reads it in fusion layers."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config import Config
from jaxsparse.data.pictures.augment import scaled
from jaxsparse.inference.sampling import Sampling, sample
from jaxsparse.nn.multimodal import MultiModalEncoder


class Captioner:
  """An encoder with a causal text that reads the picture (co-attention).

  The picture is encoded once. Each token is a pass over a row of training,
  which is short: there is no cache.
  """

  def __init__(self, config: Config, params: dict):
    """Prepares the programs.

    Args:
      config: of a run that has learned captions.
      params: of its encoder.
    """
    assert config.multimodal is not None
    self._length = config.data.seq_len
    self._params = {'params': params}
    module = MultiModalEncoder(config=config.multimodal, model=config.model)
    self._encode = jax.jit(
      functools.partial(module.apply, method='encode_image')
    )

    @functools.partial(jax.jit, static_argnames='sampling')
    def draw(params, tokens, number, image, key, sampling):
      segments = (jnp.arange(self._length) < number).astype(jnp.int32)[None]
      logits = module.apply(
        params, tokens, image, segments, method='caption_logits'
      )
      return sample(logits[:, number - 1], key, sampling)[0]

    self._draw = draw

  def tokens(
    self,
    picture: np.ndarray,
    given: np.ndarray,
    max_tokens: int = 200,
    sampling: Sampling | None = None,
    seed: int = 0,
  ) -> Iterator[int]:
    """The tokens of a caption; who reads them ends where it does.

    Args:
      picture: uint8 [S, S, 3].
      given: what the caption begins with, as `text.encode_prompt` gives it; at
        most data.seq_len tokens.
      max_tokens: of those that are drawn; a row of training is never exceeded.
      sampling: how; by default the likeliest.
      seed: same seed, same caption.
    """
    sampling = sampling or Sampling(temperature=0)
    tokens = np.zeros((1, self._length), np.int32)
    tokens[0, : len(given)] = given
    image = self._encode(self._params, scaled(picture)[None])
    most = min(self._length, len(given) - 1 + max_tokens)
    for number in range(len(given), most + 1):
      key = jax.random.fold_in(jax.random.key(seed), number)
      token = int(
        self._draw(self._params, tokens, number, image, key, sampling)
      )
      yield token
      if number < self._length:
        tokens[0, number] = token
