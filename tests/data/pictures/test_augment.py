# SPDX-License-Identifier: Apache-2.0
"""What may happen to a picture, and that nothing else does."""

import numpy as np
import pytest

from jaxsparse.config import AugmentConfig
from jaxsparse.data.pictures.augment import augmented, scaled

S = 16
PICTURE = np.random.default_rng(0).integers(0, 255, (S, S, 3), np.uint8)


def _many(number=40, picture=PICTURE, **fields):
  config = AugmentConfig(**fields)
  return [
    augmented(picture, config, np.random.default_rng(i)) for i in range(number)
  ]


def test_pixels_go_from_minus_one_to_one():
  ends = np.array([[[0, 255, 51]]], np.uint8)
  np.testing.assert_allclose(scaled(ends), [[[-1, 1, -0.6]]], atol=1e-7)
  (same,) = _many(1)
  assert same.dtype == np.float32
  np.testing.assert_array_equal(same, scaled(PICTURE))


def test_shifts_move_whole_pixels_and_white_comes_in():
  seen, whole = set(), scaled(PICTURE)
  for picture in _many(shift=0.125):
    (down, right), = [
      (down, right)
      for down in range(-2, 3)
      for right in range(-2, 3)
      if np.array_equal(
        picture[2 + down : S - 2 + down, 2 + right : S - 2 + right],
        whole[2 : S - 2, 2 : S - 2],
      )
    ]  # fmt: skip
    seen.add((down, right))
    if down > 0:
      assert (picture[:down] == 1).all()
    if right < 0:
      assert (picture[:, right:] == 1).all()
  assert {down for down, _ in seen} == set(range(-2, 3))
  assert {right for _, right in seen} == set(range(-2, 3))


def test_flips_only_where_they_are_asked_for():
  whole = scaled(PICTURE)
  seen = [np.array_equal(picture, whole) for picture in _many(flip=True)]
  assert 8 < sum(seen) < 32
  for picture, is_same in zip(_many(flip=True), seen, strict=True):
    if not is_same:
      np.testing.assert_array_equal(picture, whole[:, ::-1])


def test_a_crop_is_enlarged():
  """A ramp becomes a less steep one within it."""
  ramp = np.tile(
    np.arange(0, 16 * S, 16, dtype=np.uint8)[None, :, None], (S, 1, 3)
  )
  slopes = []
  for picture in _many(picture=ramp, crop=0.5):
    middle = picture[S // 2, 4:-4, 0]
    slopes.append(
      np.diff(middle).mean() / np.diff(scaled(ramp)[0, :, 0]).mean()
    )
  assert 0.45 < min(slopes) < 0.65
  assert 0.9 < max(slopes) < 1.05


def test_brightness_is_of_the_whole_picture():
  grey = np.full((S, S, 3), 127, np.uint8)
  changes = [
    picture - scaled(grey) for picture in _many(picture=grey, brightness=0.1)
  ]
  assert all(np.ptp(change) < 1e-6 for change in changes)
  means = [change.mean() for change in changes]
  assert -0.2 <= min(means) < -0.1 < 0.1 < max(means) <= 0.2


def test_noise_is_of_each_value():
  grey = np.full((S, S, 3), 127, np.uint8)
  changes = np.stack(
    [p - scaled(grey) for p in _many(picture=grey, noise=0.05)]
  )
  np.testing.assert_allclose(changes.std(), 0.1, rtol=0.05)
  assert abs(changes.mean()) < 0.01
  light = np.stack(_many(picture=np.full_like(grey, 254), noise=0.2))
  assert light.max() <= 1


@pytest.mark.parametrize(
  'fields',
  [dict(shift=0.2), dict(crop=0.4), dict(flip=True), dict(brightness=0.2)],
)
def test_frames_of_a_video_change_alike(fields):
  video = np.stack([PICTURE] * 3)
  for frames, alone in zip(
    _many(8, video, **fields), _many(8, **fields), strict=True
  ):
    assert frames.shape == (3, S, S, 3)
    for frame in frames:
      np.testing.assert_array_equal(frame, alone)
