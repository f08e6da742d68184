# SPDX-License-Identifier: Apache-2.0
"""Pairs of a TensorFlow Dataset that has pictures and texts."""

import hashlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import named_dataset
from jaxsparse.data.percent import Percent
from jaxsparse.data.pictures import captions, decode
from jaxsparse.data.pictures.pair import Pair


class FromTFDS:
  """The pairs of both splits; pictures are read when they are asked for."""

  is_drawn = False

  def __init__(self, name: str, config: DataConfig, say: Any = print):
    """Reads the captions.

    Args:
      name: of the dataset, or its directory.
      config: names features and splits.
      say: gets lines on the progress.

    Raises:
      UserError: the dataset or a feature is unknown, or a caption is empty.
    """
    builder = named_dataset.find(name)
    features = builder.info.features
    _require(features, tfds.features.Image, 'image_feature', config, name)
    _require(features, tfds.features.Text, 'tfds_feature', config, name)
    self._feature = config.image_feature
    # As they are stored: our own reader knows more kinds, and the too large.
    raw = {self._feature: tfds.decode.SkipDecoding()}
    sources = named_dataset.sources(builder, name, config, say, raw)
    self.pairs: list[Pair] = []
    self._places: list[tuple[Any, int]] = []
    self._name = builder.info.full_name
    percent = Percent('Reading the captions', sum(map(len, sources)), say)
    for split, source in zip(('train', 'validation'), sources, strict=True):
      for i in range(len(source)):
        percent.reach(len(self.pairs))
        where = f'example {i:,} of {split} of {name!r}'
        texts = _texts(source[i], config.tfds_feature.split('/'))
        found = tuple(
          captions.checked(text, f'the caption of {where}') for text in texts
        )
        if not found:
          raise UserError(f'{where} has no caption: leave it out.')
        self.pairs.append(
          Pair(
            name=f'{split}/{i}',
            number=len(self.pairs),
            captions=found,
            split=split,
          )
        )
        self._places.append((source, i))

  def digest(self, number: int) -> str:
    return hashlib.sha256(self._bytes(number)).hexdigest()

  def picture(self, number: int, size: int) -> np.ndarray:
    name = f'{self.pairs[number].name} of {self._name}'
    return decode.read_picture(self._bytes(number), size, name)

  def _bytes(self, number: int) -> bytes:
    source, i = self._places[number]
    return bytes(source[i][self._feature])


def _texts(value: Any, path: list[str]) -> list[str]:
  """All texts of a feature, which may lie in lists and in other features."""
  if isinstance(value, bytes):
    return [value.decode('utf-8', 'replace')]
  if isinstance(value, str):
    return [value]
  if isinstance(value, dict):
    return _texts(value[path[0]], path[1:])
  return [text for part in value for text in _texts(part, path)]


def _require(
  features: Any, kind: type, field: str, config: DataConfig, name: str
) -> None:
  found = sorted(_of_kind(features, kind))
  if getattr(config, field) not in found:
    what = 'picture' if kind is tfds.features.Image else 'text'
    raise UserError(
      f'data.{field} = {getattr(config, field)!r} is no {what} of {name!r}: '
      f'its {what}s are {", ".join(found) or "none"}.'
    )


def _of_kind(features: Any, kind: type, prefix: str = '') -> list[str]:
  """Names of the features of a kind, such as 'image' or 'captions/text'."""
  if isinstance(features, tfds.features.FeaturesDict):
    return [
      found
      for name, feature in features.items()
      for found in _of_kind(
        feature, kind, f'{prefix}/{name}' if prefix else name
      )
    ]
  # Several pictures of one example are no pair.
  if isinstance(features, tfds.features.Sequence) and (
    kind is not tfds.features.Image
  ):
    return _of_kind(features.feature, kind, prefix)
  return [prefix] if isinstance(features, kind) else []
