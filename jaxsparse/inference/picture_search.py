# SPDX-License-Identifier: Apache-2.0
"""Finds pictures by a text, and texts by a picture, in a collection.

The two towers give every picture and every caption a vector once; what is asked
for is a product with all of them. Fusing is a pass for each pair: where a
matching head was trained, it helps to put the best few in order.

The head has learned to tell a pair from negatives that were drawn in proportion
to exp(t cos). What it says is therefore what the towers do not know, and the
sum of t cos and its logit is how likely a pair is, up to a constant (Ma and
Collins 2018, arXiv:1809.01812).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config import Config
from jaxsparse.config.errors import require
from jaxsparse.data.percent import Percent
from jaxsparse.data.pictures import batches, stored
from jaxsparse.data.pictures.augment import scaled
from jaxsparse.data.pictures.pair import Pair
from jaxsparse.data.tokenizer import Tokenizer
from jaxsparse.nn.attention.maps import MAPS
from jaxsparse.nn.multimodal import MultiModalEncoder
from jaxsparse.ops import contrastive

# Rows that are encoded at once, and those that are fused.
_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Found:
  """One of the best of a collection."""

  pair: Pair
  # Cosine of both vectors.
  score: float
  # The temperature's share of it and the matching head's logit, by which the
  # best few captions are in order; None behind these, and without a head.
  match: float | None = None


class PictureSearch:
  """A collection's pictures and captions as vectors."""

  def __init__(
    self,
    config: Config,
    params: dict,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    read: stored.Read,
    say: Callable[[str], None] = print,
  ):
    """Encodes the collection.

    Args:
      config: of the run.
      params: of its encoder.
      tokenizer: of its captions.
      pairs: what is searched.
      read: gives the picture of a pair's number.
      say: gets lines on the progress.
    """
    self._config, self._tokenizer, self._pairs = config, tokenizer, pairs
    self._read = read
    module = MultiModalEncoder(config=config.multimodal, model=config.model)
    self._module, self._variables = module, {'params': params}
    self._embed_text, self._embed_image = (
      jax.jit(functools.partial(module.apply, method=f'embed_{kind}'))
      for kind in ('text', 'image')
    )
    self._match = jax.jit(functools.partial(module.apply, method=_match))
    self._tell_of_long(say)
    percent = Percent('Encoding the pictures', len(pairs), say)
    images, texts = [], []
    for start in range(0, len(pairs), _ROWS):
      percent.reach(start)
      part = pairs[start : start + _ROWS]
      images.append(self.of_pictures([read(pair.number) for pair in part]))
      texts.append(self.of_texts([pair.captions[0] for pair in part]))
    self._images, self._texts = np.concatenate(images), np.concatenate(texts)

  def of_texts(self, texts: Sequence[str]) -> np.ndarray:
    """Vectors of length 1, float32 [n, E], of at most _ROWS texts."""
    rows = self._rows(texts)
    tokens, segments = rows['tokens'], rows['segment_ids']
    vectors = self._embed_text(self._variables, tokens, segments)
    return np.asarray(vectors)[: len(texts)]

  def of_pictures(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """As `of_texts`, of pictures uint8 [S, S, 3], or of frames."""
    images = np.stack([scaled(picture) for picture in pictures])
    images = _filled(images)
    return np.asarray(self._embed_image(self._variables, images))[
      : len(pictures)
    ]

  def by_text(self, text: str, number: int) -> list[Found]:
    """The pictures that a text is nearest to, the best first."""
    return self._best(self._images @ self.of_texts([text])[0], number)

  def by_picture(self, picture: np.ndarray, number: int) -> list[Found]:
    """The captions that a picture is nearest to, the best first.

    The first ones are in order by the matching head, if there is one: it has
    learned hard texts of a picture, and no hard pictures of a text.
    """
    scores = self._texts @ self.of_pictures([picture])[0]
    assert self._config.multimodal is not None
    if not self._config.multimodal.matching_weight:
      return self._best(scores, number)
    # As many as are wanted, and as many as a program can put in order.
    best = self._best(scores, max(number, _ROWS))
    few, others = best[:_ROWS], best[_ROWS:]
    rows = self._rows([one.pair.captions[0] for one in few])
    images = _filled(np.stack([scaled(picture)] * len(few)))
    matches = np.asarray(
      self._match(self._variables, rows['tokens'], images, rows['segment_ids'])
    )
    learned = jnp.asarray(self._variables['params']['log_temperature'])
    scale = contrastive.temperature(learned)
    few = [
      dataclasses.replace(one, match=float(scale * one.score + match))
      for one, match in zip(few, matches, strict=False)
    ]
    few.sort(key=lambda one: -(one.match or 0.0))
    return (few + others)[:number]

  def attention(
    self, text: str, picture: np.ndarray
  ) -> list[tuple[str, np.ndarray]]:
    """What each token of a text reads of a picture, in the last layer.

    Returns:
      The tokens' texts, and their weights on the patches [grid, grid], the mean
      over heads.
    """
    settings = self._config.multimodal
    assert settings is not None
    rows = self._rows([text])
    images = _filled(scaled(picture)[None])
    _, sown = jax.jit(functools.partial(self._module.apply, mutable=[MAPS]))(
      self._variables, rows['tokens'], images, rows['segment_ids']
    )
    layers = sown[MAPS]['fusion']
    last = layers[max(layers)]['text_reads']['weights'][0]
    # Of tokens, heads, patches.
    weights = np.asarray(last)[0].mean(1)
    length = int(rows['segment_ids'][0].sum())
    names = [self._tokenizer.decode([int(i)]) for i in rows['tokens'][0]]
    grid = settings.vision.grid
    return [
      (name, weight.reshape(grid, grid))
      for name, weight in zip(names[:length], weights, strict=False)
    ]

  def _best(self, scores: np.ndarray, number: int) -> list[Found]:
    order = np.argsort(-scores, kind='stable')[:number]
    return [Found(self._pairs[i], float(scores[i])) for i in order]

  def _tell_of_long(self, say: Callable[[str], None]) -> None:
    length = self._config.data.seq_len
    number = sum(
      batches.row_length(self._tokenizer, pair.captions[0]) > length
      for pair in self._pairs
    )
    if number:
      say(
        f'{number:,} of {len(self._pairs):,} captions have more tokens than '
        f'data.seq_len = {length} of this model, and are searched without '
        'their ends.'
      )

  def _rows(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
    rows = [
      batches.text_row(self._config.data, self._tokenizer, text)
      for text in texts
    ]
    return {
      name: _filled(np.stack([row[name] for row in rows]))
      for name in ('tokens', 'segment_ids')
    }


def require_room(
  config: Config, tokenizer: Tokenizer, text: str, name: str
) -> None:
  """Refuses a text of which a row of training would not hold the end.

  Args:
    config: of the run.
    tokenizer: of its captions.
    text: that is asked for.
    name: of the flag with the text.
  """
  length, number = config.data.seq_len, batches.row_length(tokenizer, text)
  require(
    number <= length,
    f'{name} must have fewer than data.seq_len = {length} tokens of this '
    f'model, got {number - 1}.',
  )


def _match(
  module: MultiModalEncoder,
  tokens: jax.Array,
  images: jax.Array,
  segment_ids: jax.Array,
) -> jax.Array:
  """Whether each row's text and picture are a pair, logits [B]."""
  text = tokens
  if module.settings.fusion_type != 'prefix':
    text = module.encode_text(tokens, segment_ids)
  fused = module.fuse(text, module.encode_image(images), segment_ids)
  return module.match_logit(fused)


def _filled(rows: np.ndarray) -> np.ndarray:
  """As many rows as one program takes; those behind are zero."""
  return np.pad(rows, [(0, _ROWS - len(rows))] + [(0, 0)] * (rows.ndim - 1))
