# SPDX-License-Identifier: Apache-2.0
"""What linear maps find: by a picture's mean colour, or by its pixels.

A ridge regression from a picture to the words of its caption, fitted on the
training pairs; a caption is found by the cosine of its words with the predicted
ones. What a model finds beyond this, it has not from colours and words alone.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxsparse.analysis import retrieval
from jaxsparse.analysis.retrieval import Retrieval

_WORD = re.compile(r'\w+')
# Pixels along each side that the map of pixels gets.
_SIDE = 16
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def baselines(
  train_pictures: np.ndarray,
  train_captions: Sequence[str],
  pictures: np.ndarray,
  captions: Sequence[str],
  item: np.ndarray,
) -> dict[str, Retrieval]:
  """Retrieval of held-out pairs by 'mean colour' and by 'pixels, linear'.

  Args:
    train_pictures: of the training pairs, uint8 [N, S, S, 3].
    train_captions: the first of each, N.
    pictures: held out, [M, S, S, 3].
    captions: theirs, M.
    item: what each held-out pair is, int [M].
  """
  words = _Words(train_captions)
  said, wanted = words.of(train_captions), words.of(captions)
  maps = {'mean colour': _mean_colour, 'pixels, linear': _pixels}
  found = {}
  for name, features in maps.items():
    predicted = _ridge(features(train_pictures), said)(features(pictures))
    found[name] = retrieval.of_embeddings(predicted, wanted, item, item)
  return found


class _Words:
  """Captions as bags of words, rare ones first, of length 1."""

  def __init__(self, captions: Sequence[str]):
    counts = Counter(
      word for caption in captions for word in set(_split(caption))
    )
    self._index = {word: i for i, word in enumerate(sorted(counts))}
    numbers = np.array([counts[word] for word in self._index], np.float64)
    self._weight = np.log(1 + len(captions) / numbers)

  def of(self, captions: Sequence[str]) -> np.ndarray:
    bags = np.zeros((len(captions), len(self._index)))
    for row, caption in enumerate(captions):
      for word in _split(caption):
        if word in self._index:
          bags[row, self._index[word]] = 1
    return _normalised(bags * self._weight)


def _split(caption: str) -> list[str]:
  return _WORD.findall(caption.lower())


def _normalised(x: np.ndarray) -> np.ndarray:
  # One of unknown words alone is like none.
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _mean_colour(pictures: np.ndarray) -> np.ndarray:
  """[M, 3]."""
  return pictures.mean((1, 2)) / 255


def _pixels(pictures: np.ndarray) -> np.ndarray:
  """Means of squares, [M, 3 x 256] of large pictures."""
  size = pictures.shape[1]
  edges = np.linspace(0, size, min(_SIDE, size) + 1).astype(int)[:-1]
  widths = np.diff(np.append(edges, size))
  sums = np.add.reduceat(pictures.astype(np.float64), edges, axis=1)
  sums = np.add.reduceat(sums, edges, axis=2)
  means = sums / (widths[:, None, None] * widths[None, :, None]) / 255
  return means.reshape(len(pictures), -1)


def _ridge(features: np.ndarray, targets: np.ndarray):
  """The map whose penalty has the least error on a tenth of the rows."""
  mean, centre = features.mean(0), targets.mean(0)
  scale = features.std(0) + 1e-6

  def prepared(x):
    return (x - mean) / scale

  x, y = prepared(features), targets - centre
  is_check = np.random.default_rng(0).permutation(len(x)) < max(len(x) // 10, 1)

  def fitted(x, y, penalty):
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += penalty * len(x)
    return np.linalg.solve(gram, x.T @ y)

  def error(penalty):
    weights = fitted(x[~is_check], y[~is_check], penalty)
    return np.square(x[is_check] @ weights - y[is_check]).sum()

  best = min(_PENALTIES, key=error) if (~is_check).any() else 1.0
  weights = fitted(x, y, best)
  # Around what all captions share: of a constant all pictures are alike.
  return lambda new: _normalised(prepared(new) @ weights + centre)
