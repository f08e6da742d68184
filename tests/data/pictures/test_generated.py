# SPDX-License-Identifier: Apache-2.0
"""Generated shapes and videos: every caption is true, distractors are not."""

import itertools

import numpy as np
import pytest

from jaxsparse.data.pictures import drawing, four_shapes, frames, shapes
from jaxsparse.data.pictures.drawing import Thing

S = 32


def _seen(picture: np.ndarray, colour: str) -> np.ndarray:
  """Pixels that wholly have the colour, [S, S]."""
  return (picture == drawing.COLOURS[colour]).all(-1)


def _middle(mask: np.ndarray) -> np.ndarray:
  """Row and column of the middle of what is seen."""
  return np.argwhere(mask).mean(0)


def _is_true(caption: str, picture: np.ndarray) -> bool:
  """Read off the pixels: where each colour is, and of which shape."""
  words = caption.split()
  colours, kinds = (words[1], words[-2]), (words[2], words[-1])
  relation = ' '.join(words[3:-3])
  masks = [_seen(picture, colour) for colour in colours]
  if not all(mask.any() for mask in masks):
    return False
  (y, x), (other_y, other_x) = map(_middle, masks)
  is_there = {
    'left of': x < other_x - 2,
    'right of': x > other_x + 2,
    'above': y < other_y - 2,
    'below': y > other_y + 2,
  }[relation]
  return is_there and all(
    _kind(mask) == kind for mask, kind in zip(masks, kinds, strict=True)
  )


def _kind(mask: np.ndarray) -> str:
  """The shape by how much of its box it fills, and where."""
  rows, columns = np.argwhere(mask).T
  box = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
  share = box.mean()
  top, bottom = np.array_split(box, 2)
  if bottom.mean() > 1.6 * top.mean():
    return 'triangle'
  return 'cross' if share < 0.6 else 'circle' if share < 0.92 else 'square'


@pytest.mark.parametrize('kind', [shapes.Shapes, four_shapes.FourShapes])
def test_captions_are_true_and_distractors_are_not(kind):
  made = kind(60)
  for pair in made.pairs:
    picture = made.picture(pair.number, 96)
    assert all(_is_true(caption, picture) for caption in pair.captions)
    assert not any(_is_true(caption, picture) for caption in pair.distractors)


def test_distractors_have_the_words_of_the_caption():
  """All that can be said with them, so a bag of words is right for a fourth."""
  for pair in shapes.Shapes(60).pairs:
    words = sorted(pair.captions[0].split())
    # Articles go with colours.
    assert all(sorted(d.split()) == words for d in pair.distractors)
    assert len({pair.captions[0], *pair.distractors}) == 4


@pytest.mark.parametrize('kind', [shapes.Shapes, four_shapes.FourShapes])
def test_all_relations_shapes_and_colours_come_first(kind):
  first = {tuple(p.captions[0].split()) for p in kind(400).pairs}
  relations = {' '.join(words[3:-3]) for words in first}
  assert relations == set(shapes._RELATIONS)
  assert {words[1] for words in first} == set(shapes.COLOURS)
  assert {words[2] for words in first} == set(shapes.SHAPES)


@pytest.mark.parametrize(
  'kind', [shapes.Shapes, four_shapes.FourShapes, frames.Frames]
)
def test_a_number_gives_the_same_picture_at_any_size(kind):
  one, other = kind(5), kind(9)
  assert list(one.pairs) == list(other.pairs[:5])
  np.testing.assert_array_equal(one.picture(3, S), other.picture(3, S))
  assert one.digest(3) == other.digest(3) != one.digest(4)
  small, large = (one.picture(3, size).astype(float) for size in (S, 2 * S))
  halves = large.reshape(*large.shape[:-3], S, 2, S, 2, 3).mean((-4, -2))
  assert abs(halves - small).mean() < 6


def test_the_question_names_the_shot_that_answers():
  made = frames.Frames(12)
  for pair in made.pairs:
    video, shown = made.picture(pair.number, S), frames.scene(pair.number)
    assert video.shape == (16, S, S, 3)
    shots = list(dict.fromkeys(thing.shape for thing in shown.things))
    assert len(shots) == shown.num_shots
    length = 16 // shown.num_shots
    kinds = [kind for kind in shots for _ in range(length)]
    assert [thing.shape for thing in shown.things] == kinds
    assert pair.prompt == f'the {kinds[shown.asked]} is '
    for frame in range(shown.asked, shown.asked + length):
      assert _seen(video[frame], pair.captions[0]).sum() > 20
    assert {*pair.captions, *pair.distractors} == set(frames.COLOURS)


def test_held_out_videos_show_every_shape_in_a_frame_of_its_own():
  made = [frames.scene(number) for number in range(480)]
  held_out = [video for video in made if video.is_held_out]
  assert len(held_out) == 60
  assert {video.num_shots for video in held_out} == {16}
  assert len({video.asked for video in held_out}) > 12
  assert {video.num_shots for video in made} == set(frames.NUM_SHOTS)
  splits = [pair.split for pair in frames.Frames(9).pairs]
  assert splits == ['validation', *['train'] * 7, 'validation']


def test_answers_cant_be_guessed_from_questions():
  pairs = frames.Frames(600).pairs
  answers = [pair.captions[0] for pair in pairs]
  most = max(answers.count(colour) for colour in frames.COLOURS)
  assert most < 600 / 8 * 1.4


def test_shapes_differ():
  """No two kinds of shape are drawn alike."""
  drawn = [
    drawing.draw([Thing(kind, 'black', 0.5, 0.5, 0.4)], S)
    for kind in drawing.SHAPES
  ]
  for a, b in itertools.combinations(drawn, 2):
    assert (abs(a.astype(int) - b) > 100).any(-1).sum() > 30


def test_a_shape_at_the_edge_is_cut_off():
  whole = drawing.draw([Thing('square', 'red', 0.5, 0.5, 0.2)], S)
  half = drawing.draw([Thing('square', 'red', 0.0, 0.5, 0.2)], S)
  np.testing.assert_array_equal(half[:, : S // 2], whole[:, S // 2 :])
