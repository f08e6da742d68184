# SPDX-License-Identifier: Apache-2.0
"""Ranks over the whole set, ties, equal items, intervals and baselines."""

import itertools

import numpy as np
import pytest

from jaxsparse.analysis import retrieval, retrieval_baselines
from jaxsparse.data.pictures.shapes import Shapes


def _by_hand(scores, right, k):
  """Hits at k and rank of the first right one, over all orders of ties."""
  hits, ranks = [], []
  for order in itertools.permutations(range(len(scores))):
    # Stable: among equal scores the order drawn.
    ranked = sorted(order, key=lambda i: -scores[i])
    first = min(ranked.index(i) for i in right)
    hits.append(first < k)
    ranks.append(first + 1)
  return np.mean(hits), np.mean(ranks)


def test_ties_and_equal_items_are_as_over_all_orders():
  rng = np.random.default_rng(0)
  for _ in range(12):
    scores = rng.integers(0, 3, (1, 6)).astype(float)
    items = rng.integers(0, 3, 6)
    items[rng.integers(6)] = 1
    got = retrieval.direction(
      lambda rows, s=scores: s[rows], np.array([1]), items
    )
    for k in (1, 5):
      hit, rank = _by_hand(scores[0], np.flatnonzero(items == 1), k)
      np.testing.assert_allclose(got.recall(k), hit)
      np.testing.assert_allclose(got.ranks, [rank])


def test_one_score_for_all_is_chance():
  number = 40
  item = np.arange(number)
  found = retrieval.of_scores(np.zeros((number, number)), item, item)
  for direction in (found.captions, found.pictures):
    for k in retrieval.RANKS:
      np.testing.assert_allclose(direction.recall(k), k / number)
      np.testing.assert_allclose(direction.chance[k], k / number)
    assert direction.median_rank == (number + 1) / 2


def test_equal_pairs_are_right_for_each_other():
  """Two pairs of one item: either caption is right for either picture."""
  item = np.array([7, 7, 8])
  scores = np.array([[0.0, 1, 0.5], [1, 0, 0.5], [0, 0.5, 1]])
  found = retrieval.of_scores(scores, item, item)
  assert found.captions.recall(1) == found.pictures.recall(1) == 1
  alone = retrieval.of_scores(scores, np.arange(3), np.arange(3))
  assert alone.captions.recall(1) == pytest.approx(1 / 3)


def test_directions_are_not_confused():
  scores = np.array([[3.0, 2, 1], [3, 1, 2], [3, 2, 1]])
  item = np.arange(3)
  found = retrieval.of_scores(scores, item, item)
  # All pictures take the first caption.
  assert found.captions.ranks.tolist() == [1, 3, 3]
  assert found.pictures.ranks.tolist() == [2, 3, 2.5]


def test_captions_may_be_more_than_pictures():
  image, text = np.eye(3), np.repeat(np.eye(3), 2, 0)
  found = retrieval.of_embeddings(
    image, text, np.arange(3), np.repeat(np.arange(3), 2)
  )
  assert found.captions.recall(1) == found.pictures.recall(1) == 1
  assert (len(found.captions.ranks), len(found.pictures.ranks)) == (3, 6)


def test_blocks_change_nothing(monkeypatch):
  rng = np.random.default_rng(1)
  image, text = rng.normal(size=(2, 50, 4))
  item = np.arange(50)
  whole = retrieval.of_embeddings(image, text, item, item)
  monkeypatch.setattr(retrieval, '_BLOCK', 170)
  parts = retrieval.of_embeddings(image, text, item, item)
  np.testing.assert_array_equal(whole.pictures.ranks, parts.pictures.ranks)
  assert whole.scalars() == parts.scalars()


def test_intervals_are_of_resampled_queries():
  """As wide as the binomial's, and the same again."""
  rng = np.random.default_rng(2)
  ranks = np.where(rng.uniform(size=400) < 0.3, 1.0, 20.0)
  hits = {k: (ranks <= k).astype(float) for k in retrieval.RANKS}
  direction = retrieval.Direction(hits, ranks, dict.fromkeys(hits, 0.01))
  low, high = direction.interval(1)
  assert low < direction.recall(1) < high
  p = direction.recall(1)
  np.testing.assert_allclose(
    high - low, 2 * 1.96 * np.sqrt(p * (1 - p) / 400), rtol=0.15
  )
  assert direction.interval(1) == (low, high)
  assert direction.interval() == (20, 20)


def test_lines_say_bounds_and_chance():
  item = np.arange(20)
  found = retrieval.of_embeddings(np.eye(20), np.eye(20), item, item)
  line = next(found.lines())
  assert line.startswith(
    'picture -> caption of 20: R@1 1.000 (1.000 to 1.000; chance 0.050)'
  )
  assert line.endswith('median rank 1 (1 to 1)')
  assert found.scalars()['pictures_recall_at_5'] == 1


def test_what_cant_be_ranked_is_refused():
  item = np.arange(2)
  with pytest.raises(ValueError, match='not finite'):
    retrieval.of_scores(np.array([[1, np.nan], [0, 1]]), item, item)
  with pytest.raises(ValueError, match='no right candidate'):
    retrieval.of_scores(np.eye(2), item, item + 1)


def _baselines(pairs, number, size=16):
  held_out, learned = pairs.pairs[:number], pairs.pairs[number:]

  def pictures(some):
    return np.stack([pairs.picture(p.number, size) for p in some])

  said = [p.captions[0] for p in held_out]
  return retrieval_baselines.baselines(
    pictures(learned),
    [p.captions[0] for p in learned],
    pictures(held_out),
    said,
    np.array([said.index(caption) for caption in said]),
  )


def test_baselines_find_colours():
  """Far above chance on colours and shapes; linear maps of pixels know more."""
  found = _baselines(Shapes(700), 100)
  colour, pixels = (
    found[name].pictures for name in ('mean colour', 'pixels, linear')
  )
  assert colour.recall(10) > 2.5 * colour.chance[10]
  assert pixels.recall(10) > 2.5 * pixels.chance[10]
  assert colour.chance[1] < 0.02


def test_baselines_see_nothing_where_there_is_nothing():
  """White pictures: chance."""
  number = 30
  white = np.full((number, 8, 8, 3), 255, np.uint8)
  said = [f'word{i} and word{i % 7}' for i in range(number)]
  for found in retrieval_baselines.baselines(
    white, said, white, said, np.arange(number)
  ).values():
    assert found.captions.recall(1) < 0.1
    assert found.pictures.recall(1) == pytest.approx(1 / number)
