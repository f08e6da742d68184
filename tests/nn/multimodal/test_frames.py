# SPDX-License-Identifier: Apache-2.0
"""A video's frames, of which the text reads some."""

import jax
import jax.numpy as jnp
import numpy as np
from encoders import ENCODERS, FRAMES, NUM_PATCHES, B, P, params_of, run

from jaxsparse.nn.multimodal import PatchEncoder
from jaxsparse.ops.patches import patchify

SEEN = np.ones((B, 4, NUM_PATCHES), np.int32)


def read_by(found):
  """The frames with the largest shares, in their order."""
  return np.sort(np.argsort(-found['shares'], axis=1, stable=True)[:, :2])


def test_frames_are_pictures_one_after_another():
  found = run('frames')
  module = PatchEncoder(ENCODERS['frames'].config.vision)
  params = params_of('frames')['params']['image']
  patches = patchify(jnp.asarray(FRAMES[:, 1]), P)
  alone, _ = jax.jit(module.apply)({'params': params}, patches)
  at = slice(NUM_PATCHES, 2 * NUM_PATCHES)
  np.testing.assert_allclose(found['image'][:, at], alone, atol=1e-5)
  assert found['metrics']['frames/share_read'] == 0.5


def test_another_order_of_frames_is_the_same_choice():
  want, order = run('frames'), np.array([2, 0, 3, 1])
  got = run('frames', images=FRAMES[:, order])
  np.testing.assert_allclose(got['shares'], want['shares'][:, order], atol=1e-5)
  np.testing.assert_allclose(got['fused'], want['fused'], atol=1e-5)
  np.testing.assert_array_equal(
    np.sort(order[read_by(got)], axis=1), read_by(want)
  )


def test_equal_frames_have_equal_shares():
  frames = FRAMES.copy()
  frames[:, 3] = frames[:, 1]
  shares = run('frames', images=frames)['shares']
  np.testing.assert_allclose(shares[:, 1], shares[:, 3], atol=1e-6)


def test_what_is_not_chosen_is_not_read():
  want = run('frames')
  frames, others = FRAMES.copy(), np.argmin(want['shares'], axis=1)
  frames[np.arange(B), others] *= 0.99
  got = run('frames', images=frames)
  np.testing.assert_array_equal(read_by(got), read_by(want))
  np.testing.assert_array_equal(got['fused'], want['fused'])
  chosen = np.argmax(want['shares'], axis=1)
  frames[np.arange(B), chosen] *= 0.9
  assert np.abs(run('frames', images=frames)['fused'] - got['fused']).max() > 0


def test_frames_that_are_not_there_count_as_nothing():
  seen = SEEN.copy()
  seen[0, 1:] = 0
  found = run('frames', seen=seen)
  np.testing.assert_allclose(found['metrics']['frames/share_read'], 3 / 5)
  np.testing.assert_array_equal(found['shares'][0, 1:], 0)
  other = FRAMES.copy()
  other[0, 1:] = np.nan
  again = run('frames', images=other, seen=seen)
  np.testing.assert_allclose(again['fused'], found['fused'], atol=1e-6)


def test_the_text_decides():
  want = run('frames')['shares']
  tokens = np.array([[1] * 5, [2] * 5], np.int32)
  assert np.abs(run('frames', tokens)['shares'] - want).max() > 1e-4
