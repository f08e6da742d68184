# SPDX-License-Identifier: Apache-2.0
"""Which frames are read: by a text, at equal distances, where they change."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.ops.sparse_attention import frame_choice

B, F, N, H, L, E = 2, 6, 3, 4, 2, 5
RNG = np.random.default_rng(0)
QUERY = jnp.asarray(RNG.normal(size=(B, N, H)), jnp.float32)
KEY = jnp.asarray(RNG.normal(size=(B, F, H)), jnp.float32)
ALL = jnp.ones((B, F), bool)


@functools.partial(jax.jit, static_argnums=(3, 4))
def routed(query, key, is_there, num_read=2, coverage=1.0):
  return frame_choice.routed(query, key, is_there, num_read, coverage)


def shares_by_hand(query, key):
  score = np.einsum('bnh,bfh->bnf', query, key) * H**-0.5
  weight = np.exp(score)
  return (weight / weight.sum(-1, keepdims=True)).mean(1)


def test_the_text_chooses_by_the_products_of_heads():
  choice = routed(QUERY, KEY, ALL)
  shares = shares_by_hand(QUERY, KEY)
  np.testing.assert_allclose(choice.shares, shares, atol=1e-6)
  order = np.argsort(-shares, axis=1, stable=True)
  np.testing.assert_array_equal(choice.frame, order[:, :2])
  assert choice.is_read.all()


def test_another_order_of_frames_is_the_same_choice():
  order = RNG.permutation(F)
  want, got = routed(QUERY, KEY, ALL), routed(QUERY, KEY[:, order], ALL)
  np.testing.assert_array_equal(order[np.asarray(got.frame)], want.frame)
  np.testing.assert_allclose(got.shares, want.shares[:, order], atol=1e-6)


def test_equal_frames_have_equal_shares():
  shares = routed(QUERY, KEY.at[:, 4].set(KEY[:, 1]), ALL).shares
  np.testing.assert_array_equal(shares[:, 1], shares[:, 4])


def test_frames_that_are_not_there_are_not_read():
  is_there = ALL.at[0, 1:].set(False)
  choice = routed(QUERY, KEY, is_there)
  np.testing.assert_array_equal(choice.is_read[0], [True, False])
  np.testing.assert_allclose(choice.gate[0], [1.0, 0.0])
  assert choice.frame[0, 0] == 0
  np.testing.assert_array_equal(choice.shares[0, 1:], 0.0)
  none = routed(QUERY, KEY, ALL & False)
  assert not none.is_read.any()
  assert np.isfinite(none.gate).all()


def test_coverage_reads_fewer_where_one_says_enough():
  longest = jnp.linalg.norm(KEY[0], axis=-1).argmax()
  sharp = QUERY.at[0].set(50 * KEY[0, longest]).at[1].set(0.0)
  choice = routed(sharp, KEY, ALL, 4, 0.6)
  np.testing.assert_array_equal(choice.is_read.sum(1), [1, 4])
  assert choice.frame[0, 0] == longest


def test_gates_are_the_importance_of_what_is_read():
  """Of mean 1, and with the gradient of that; the others do not matter."""
  choice = routed(QUERY, KEY, ALL)
  kept = np.take_along_axis(np.asarray(KEY), choice.frame[..., None], axis=1)
  gate = 2 * shares_by_hand(QUERY, kept)
  np.testing.assert_allclose(choice.gate, gate, atol=1e-6)

  def first(key):
    return frame_choice.routed(QUERY, key, ALL, 2).gate[:, 0].sum()

  of_key = np.asarray(jax.jit(jax.grad(first))(KEY))
  is_read = np.zeros((B, F), bool)
  np.put_along_axis(is_read, np.asarray(choice.frame), True, axis=1)
  np.testing.assert_array_equal(of_key[~is_read], 0.0)
  assert (np.abs(of_key[is_read]).max(-1) > 1e-3).all()


def test_every_nth_frame():
  choice = frame_choice.uniform(ALL.at[1, 4].set(False), 3)
  np.testing.assert_array_equal(choice.frame, [[1, 3, 5]] * B)
  sixteen = frame_choice.uniform(jnp.ones((1, 16), bool), 2)
  np.testing.assert_array_equal(sixteen.frame, [[4, 12]])
  assert choice.is_read.all()


def test_where_frames_change():
  shown = jnp.zeros((1, F, E)).at[:, 2:].set(1.0).at[:, 5:].set(3.0)
  choice = frame_choice.change(shown, ALL[:1], 3)
  np.testing.assert_array_equal(choice.frame, [[0, 5, 2]])


def test_only_what_is_chosen_is_read():
  frames = jnp.arange(B * F * L, dtype=jnp.float32).reshape(B, F, L, 1)
  segments = jnp.ones((B, F, L), jnp.int32)
  choice = frame_choice.FrameChoice(
    jnp.array([[3, 0], [5, 2]]),
    jnp.array([[True, True], [True, False]]),
    jnp.array([[1.0, 2.0], [3.0, 4.0]]),
    jnp.zeros((B, F)),
  )
  kept, ids, gate = frame_choice.read_frames(choice, frames, segments)
  np.testing.assert_array_equal(kept[..., 0], [[6, 7, 0, 1], [22, 23, 16, 17]])
  np.testing.assert_array_equal(ids, [[1, 1, 1, 1], [1, 1, 0, 0]])
  np.testing.assert_array_equal(gate, [[1, 1, 2, 2], [3, 3, 4, 4]])
