# SPDX-License-Identifier: Apache-2.0
"""How well pictures find their captions, and captions their pictures.

Each query has all candidates of the held-out set before it, never a batch of
them. Candidates that are right for it are all of its item: equal pictures,
captions of one meaning. Equal scores lie in a random order, of which the
expectation is taken, so that a model that gives every pair one score is exactly
at chance.
"""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

RANKS = (1, 5, 10)

# Scores that are held at once.
_BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Direction:
  """What one kind of queries finds.

  Attributes:
    hits: by k the probability that a right candidate is among the first k, of
      each query, float64 [n].
    ranks: of each query, that of the first right candidate, from 1, [n].
    chance: by k what guessing finds on average.
  """

  hits: dict[int, np.ndarray]
  ranks: np.ndarray
  chance: dict[int, float]

  def recall(self, k: int) -> float:
    return float(self.hits[k].mean())

  @property
  def median_rank(self) -> float:
    return float(np.median(self.ranks))

  def interval(
    self, k: int = 0, level: float = 0.95, draws: int = 1000, seed: int = 0
  ) -> tuple[float, float]:
    """Bounds of recall at k, by the bootstrap over queries.

    Candidates stay as they are.

    Args:
      k: of the recall; 0 for the median rank.
      level: share of resampled values between the bounds.
      draws: how often queries are drawn anew.
      seed: of the draws.
    """
    values = self.hits[k] if k else self.ranks
    statistic = np.mean if k else np.median
    rng = np.random.default_rng(seed)
    resampled = [
      statistic(values[rng.integers(len(values), size=len(values))])
      for _ in range(draws)
    ]
    rest = (1 - level) / 2
    low, high = np.quantile(resampled, [rest, 1 - rest])
    return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Retrieval:
  """Both directions."""

  captions: Direction
  pictures: Direction

  def scalars(self) -> dict[str, float]:
    """All figures by their names, such as 'captions_recall_at_1'."""
    found = {}
    for name in ('captions', 'pictures'):
      direction = getattr(self, name)
      for k in direction.hits:
        found[f'{name}_recall_at_{k}'] = direction.recall(k)
      found[f'{name}_median_rank'] = direction.median_rank
    return found

  def lines(self) -> Iterator[str]:
    """A line for each direction, with bounds and chance."""
    for name, what in (
      ('captions', 'picture -> caption'),
      ('pictures', 'caption -> picture'),
    ):
      direction = getattr(self, name)
      parts = []
      for k in direction.hits:
        low, high = direction.interval(k)
        parts.append(
          f'R@{k} {direction.recall(k):.3f} ({low:.3f} to {high:.3f}; chance '
          f'{direction.chance[k]:.3f})'
        )
      low, high = direction.interval()
      parts.append(
        f'median rank {direction.median_rank:g} ({low:g} to {high:g})'
      )
      yield f'{what} of {len(direction.ranks):,}: {", ".join(parts)}'


def of_embeddings(
  image: np.ndarray,
  text: np.ndarray,
  image_item: np.ndarray,
  text_item: np.ndarray,
) -> Retrieval:
  """Retrieval by products of embeddings.

  Args:
    image: of all held-out pictures, [N, E].
    text: of all held-out captions, [M, E].
    image_item: what each picture is, int [N].
    text_item: what each caption is about; every item has both.
  """
  return Retrieval(
    captions=direction(
      lambda rows: image[rows] @ text.T, image_item, text_item
    ),
    pictures=direction(
      lambda rows: text[rows] @ image.T, text_item, image_item
    ),
  )


def of_scores(
  scores: np.ndarray, image_item: np.ndarray, text_item: np.ndarray
) -> Retrieval:
  """Retrieval by the scores [N, M] of all pairs; others as `of_embeddings`."""
  return Retrieval(
    captions=direction(lambda rows: scores[rows], image_item, text_item),
    pictures=direction(lambda rows: scores.T[rows], text_item, image_item),
  )


def direction(
  score: Callable[[slice], np.ndarray],
  query_item: np.ndarray,
  candidate_item: np.ndarray,
) -> Direction:
  """What queries find among candidates.

  Args:
    score: of the queries in a slice, [m, M].
    query_item: what each query is, [N].
    candidate_item: what each candidate is, [M].

  Raises:
    ValueError: a query has no right candidate, or a score is not finite.
  """
  counts = []
  number, size = len(query_item), len(candidate_item)
  step = max(_BLOCK // max(size, 1), 1)
  for start in range(0, number, step):
    rows = slice(start, min(start + step, number))
    scores = np.asarray(score(rows), np.float64)
    if not np.isfinite(scores).all():
      raise ValueError('a score of retrieval is not finite')
    is_right = query_item[rows, None] == candidate_item[None]
    if not is_right.any(1).all():
      raise ValueError('a query of retrieval has no right candidate')
    best = np.where(is_right, scores, -np.inf).max(1, keepdims=True)
    is_tied = scores == best
    counts.append(
      np.stack(
        [
          # Above all right ones, as high as the best of them, and these.
          (scores > best).sum(1),
          (is_tied & ~is_right).sum(1),
          (is_tied & is_right).sum(1),
          is_right.sum(1),
        ]
      )
    )
  above, tied, right, all_right = np.concatenate(counts, axis=1)
  none = np.zeros(number, np.int64)
  return Direction(
    hits={k: _found(k - above, tied, right) for k in RANKS},
    # Of right ones among wrong ones the first has tied / (right + 1) before it.
    ranks=1 + above + tied / (right + 1),
    chance={
      k: float(_found(none + k, size - all_right, all_right).mean())
      for k in RANKS
    },
  )


def _found(
  places: np.ndarray, wrong: np.ndarray, right: np.ndarray
) -> np.ndarray:
  """Probability that one of the right is in the first places of a shuffle."""
  places = np.clip(places, 0, wrong + right)
  missed = np.ones(len(places))
  for i in range(int(places.max(initial=0))):
    is_place = i < places
    left = np.maximum(wrong + right - i, 1)
    missed *= np.where(is_place, np.clip(wrong - i, 0, None) / left, 1)
  return 1 - missed
