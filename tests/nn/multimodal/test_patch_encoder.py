# SPDX-License-Identifier: Apache-2.0
"""Pictures as patches and states: orders, places, packing and padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from parameters import draw

from jaxsparse.analysis.multimodal_cost import vision_parameters
from jaxsparse.config import VisionConfig
from jaxsparse.config.errors import UserError
from jaxsparse.config.multimodal import encoder_stream
from jaxsparse.nn.multimodal import PatchEncoder
from jaxsparse.ops.patches import patchify, places, sines_2d, unpatchify

P, GRID, WIDTH = 2, 3, 16
STREAM = dataclasses.replace(
  encoder_stream(WIDTH, 1), num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=16
)
POSITIONS = ('learned', 'sincos', 'factorised', 'rope')
RNG = np.random.default_rng(0)
B, L = 2, GRID**2
PATCHES = RNG.normal(size=(B, L, 3 * P * P)).astype(np.float32)
AT = np.broadcast_to(np.array(places(GRID, GRID)), (B, L, 2))
ONES = np.ones((B, L), np.int32)


def config(positions):
  return VisionConfig(
    stream=STREAM, image_size=P * GRID, patch_size=P, positions=positions
  )


@functools.cache
def compiled(positions):
  module = PatchEncoder(config(positions))
  params = draw(module.init, PATCHES)
  run = jax.jit(lambda *arguments: module.apply(*arguments)[0])
  return functools.partial(run, params)


def states(positions='learned', patches=PATCHES, at=AT, segments=ONES):
  return np.asarray(compiled(positions)(patches, at, segments))


def test_patches_are_rows_then_columns_then_pixels():
  images = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
  patches = patchify(jnp.asarray(images), 2)
  assert patches.shape == (2, 6, 12)
  row, column = places(2, 3)[4]
  assert (row, column) == (1, 1)
  expected = images[1, 2:4, 2:4].reshape(-1)
  np.testing.assert_array_equal(patches[1, 4], expected)
  np.testing.assert_array_equal(unpatchify(patches, 2, 3), images)
  with pytest.raises(UserError, match='multiples of patch_size = 4, got 4 x 6'):
    patchify(jnp.asarray(images), 4)


def test_sines_by_hand():
  got = np.asarray(sines_2d(jnp.array([[2, 3]]), 8))[0]
  slow = 1e-4
  row = [np.sin(2), np.sin(2 * slow), np.cos(2), np.cos(2 * slow)]
  column = [np.sin(3), np.sin(3 * slow), np.cos(3), np.cos(3 * slow)]
  np.testing.assert_allclose(got, row + column, atol=1e-6)


@pytest.mark.parametrize('positions', few(['learned', 'rope'], POSITIONS))
def test_another_order_of_patches_is_the_same_picture(positions):
  """With the places it is; what a patch is depends on them."""
  order = RNG.permutation(L)
  want = states(positions)
  got = states(positions, PATCHES[:, order], AT[:, order])
  np.testing.assert_allclose(got, want[:, order], atol=1e-5)
  other = states(positions, PATCHES[:, order])
  assert np.abs(other - want[:, order]).max() > 1e-2


def test_rotation_knows_distances_only():
  np.testing.assert_allclose(
    states('rope', at=AT + np.array([3, 7], np.int32)), states('rope'),
    atol=1e-4,
  )  # fmt: skip
  # Of rows and of columns.
  for axis in range(2):
    stretched = AT * np.where(np.arange(2) == axis, 2, 1).astype(np.int32)
    assert np.abs(states('rope', at=stretched) - states('rope')).max() > 1e-3


def test_packed_neighbours_and_padding_change_nothing():
  """Pictures of 4 and 3 patches in a row, and what is no patch at all."""
  segments = np.array([[1] * 4 + [2] * 3 + [0] * 2, [1] * 9], np.int32)
  want = states(segments=segments)
  others = PATCHES.copy()
  others[0, 4:] += 1
  got = states(patches=others, segments=segments)
  np.testing.assert_array_equal(got[0, :4], want[0, :4])
  alone = states(segments=np.where(segments == 1, 1, 0).astype(np.int32))
  np.testing.assert_allclose(alone[0, :4], want[0, :4], atol=1e-6)
  # In another row, at another place of it.
  moved = np.roll(PATCHES, -4, axis=1), np.roll(AT, -4, axis=1)
  segments = np.array([[1] * 3 + [0] * 6, [1] * 9], np.int32)
  got = states('learned', *moved, segments)
  np.testing.assert_allclose(got[0, :3], want[0, 4:7], atol=1e-5)


def test_no_patch_is_no_nan():
  assert np.isfinite(states(segments=ONES * 0)).all()
  other = states(segments=ONES * np.array([[0], [1]], np.int32))
  np.testing.assert_allclose(other[1], states()[1], atol=1e-6)


def test_a_place_beyond_the_table_is_seen_at_once():
  at = AT.copy()
  at[0, 2] = 0, GRID
  got = states(at=at)
  assert np.isnan(got[0]).all()
  assert np.isfinite(got[1]).all()


def test_any_leading_dimensions():
  """Frames, a single picture, and none."""
  module = PatchEncoder(config('learned'))

  @jax.jit
  def run(params, patches):
    of = functools.partial(module.apply, params)
    return (
      of(patches[:, None])[0], of(patches[0])[0], of(patches[:0])[0],
      of(patches[:1])[0],
    )  # fmt: skip

  frames, one, none, alone = run(*compiled('learned').args, PATCHES)
  np.testing.assert_allclose(frames[:, 0], states(), atol=1e-5)
  np.testing.assert_allclose(one, states()[0], atol=1e-5)
  np.testing.assert_allclose(alone[0], states()[0], atol=1e-5)
  assert none.shape == (0, L, WIDTH)


def test_what_does_not_fit_is_a_sentence():
  init = functools.partial(
    jax.eval_shape, PatchEncoder(config('learned')).init, jax.random.key(0)
  )
  with pytest.raises(UserError, match='= 12 numbers each, got 11'):
    init(PATCHES[..., :-1])
  with pytest.raises(UserError, match='6 pixels a side, 9 patches, or `at`'):
    init(PATCHES[:, 1:])


@pytest.mark.parametrize(
  ('changes', 'sentence'),
  [
    (dict(patch_size=5), 'patch_size must divide image_size = 224, got 5'),
    (dict(positions='none'), 'positions must be one of learned'),
    (
      dict(stream=dataclasses.replace(STREAM, is_causal=True)),
      'vision.stream.is_causal must be False',
    ),
    (
      dict(stream=dataclasses.replace(STREAM, attention_pattern=('local',))),
      r"vision.stream.attention_pattern must be \('global',\)",
    ),
    (
      dict(stream=dataclasses.replace(STREAM, head_dim=6), positions='rope'),
      "'rope' needs a multiple of 4, .* got 6",
    ),
    (
      dict(stream=dataclasses.replace(STREAM, vocab_size=3)),
      'vision.stream.vocab_size must be 0',
    ),
  ],
)
def test_settings_that_cannot_be(changes, sentence):
  with pytest.raises(UserError, match=sentence):
    VisionConfig(**changes)


@pytest.mark.parametrize('positions', POSITIONS)
def test_parameters_in_closed_form(positions):
  module = PatchEncoder(config(positions))
  shapes = jax.eval_shape(module.init, jax.random.key(0), PATCHES)
  counted = sum(x.size for x in jax.tree.leaves(shapes))
  assert vision_parameters(config(positions)).total == counted


def test_vit_b_16_has_86_million_parameters():
  """Dosovitskiy et al. 2021, Table 1; here without a class token and head."""
  counted = vision_parameters(VisionConfig()).total
  assert counted == 85_797_120
