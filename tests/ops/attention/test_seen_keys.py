# SPDX-License-Identifier: Apache-2.0
"""Attention to later keys: without causality, with spans, across streams."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import mesh
from jaxsparse.config.errors import UserError
from jaxsparse.ops.attention.compose import HeadMix
from jaxsparse.ops.attention.dense import attention, attention_reference
from jaxsparse.ops.attention.spans import reach_of_spans, reach_reference

B, T, N, K, H = 2, 12, 4, 2, 4
# Two documents and padding; the first begins with a prefix, the second has a
# span in its middle, and behind it another.
SEGMENTS = np.array([[1] * 6 + [2] * 5 + [0], [1] * 12], np.int32)
POSITIONS = np.array([[*range(6), *range(5), 0], [*range(12)]], np.int32)
SPANS = np.array(
  [[1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0], [3] * 4 + [2] * 2 + [0] * 6], np.int32
)


def heads(num_queries, num_keys, dtype=np.float32):
  rng = np.random.default_rng(0)
  shapes = [(B, num_queries, N, H), *[(B, num_keys, K, H)] * 2]
  return [rng.normal(size=shape).astype(dtype) for shape in shapes]


def mixes():
  rng = np.random.default_rng(1)

  def factors():
    return jnp.asarray(rng.normal(size=(B, T, 5, N)), jnp.float32) / 4

  return {
    name: HeadMix(query=factors(), key=factors(), base=None, num_groups=1)
    for name in ('pre', 'post')
  }


def on_device(*arrays):
  return [jnp.asarray(x) for x in arrays]


def seen_by_hand(window=0, is_causal=True, spans=None):
  reach = None
  if spans is not None:
    reach = reach_reference(*on_device(spans, POSITIONS, SEGMENTS))
  mask = np.zeros((B, T, T), bool)
  for b in range(B):
    for i in range(T):
      for j in range(T):
        same = SEGMENTS[b, i] == SEGMENTS[b, j] > 0
        behind = POSITIONS[b, j] - POSITIONS[b, i]
        most = behind if not is_causal else 0
        if reach is not None:
          most = reach[b][i] - POSITIONS[b, i]
        near = not window or abs(behind) < window
        mask[b, i, j] = same and behind <= most and near
  return mask


def by_hand(query, key, value, mask):
  key, value = (np.repeat(x, N // K, axis=2) for x in (key, value))
  score = np.einsum('btnh,bsnh->bnts', query, key) * H**-0.5
  weight = np.exp(score) * mask[:, None]
  weight /= np.maximum(weight.sum(-1, keepdims=True), 1e-30)
  return np.einsum('bnts,bsnh->btnh', weight, value)


def test_spans_by_hand():
  segments, spans = SEGMENTS.copy(), SPANS.copy()
  # Padding in a span, such as patches that are not there, and at its end.
  segments[1, [1, 5]] = 0
  positions = np.array([[*range(6), *range(5), 0], [0, 0, *range(1, 11)]])
  arguments = on_device(spans, positions.astype(np.int32), segments)
  got = np.where(segments > 0, jax.jit(reach_of_spans)(*arguments), 0)
  expected = reach_reference(*arguments)
  np.testing.assert_array_equal(got, expected)
  assert expected[0] == [2, 2, 2, 3, 4, 5, 0, 2, 2, 3, 4, 0]
  assert expected[1] == [2, 0, 2, 2, 3, 0, *range(5, 11)]


@pytest.mark.parametrize(
  'sight',
  [
    dict(is_causal=False),
    dict(spans=SPANS),
    dict(is_causal=False, window=3),
    dict(spans=SPANS, window=3),
  ],
  ids=['full', 'spans', 'full_window', 'spans_window'],
)
def test_what_is_seen(sight):
  """At once, in chunks, with composed heads; the reference and by hand."""
  arrays = heads(T, T)
  ids = on_device(POSITIONS, POSITIONS, SEGMENTS, SEGMENTS)
  how = dict(sight)
  spans = how.pop('spans', None)
  if spans is not None:
    how['reach'] = reach_of_spans(*on_device(spans, POSITIONS, SEGMENTS))

  @jax.jit
  def run(*arrays):
    both = functools.partial(attention_reference, *arrays, *ids, **how)
    ours = functools.partial(attention, *arrays, *ids, **how)
    plain = ours(), ours(chunk=5), both()
    if 'window' in how:
      return plain, ()
    composed = ours(**mixes()), ours(**mixes(), chunk=5), both(**mixes())
    return plain, composed

  plain, composed = run(*arrays)
  want = by_hand(*arrays, seen_by_hand(**sight))
  for got in plain:
    np.testing.assert_allclose(got, want, atol=1e-5)
  for got in composed:
    np.testing.assert_allclose(got, composed[-1], atol=1e-5)


def test_the_first_half_sees_the_second():
  """Where a CPU leaves later keys out, it must not."""
  rng = np.random.default_rng(0)
  arrays = [rng.normal(size=(1, 64, 2, 4)).astype(np.float32) for _ in 'qkv']
  rows, ones = jnp.arange(64)[None], jnp.ones((1, 64), jnp.int32)

  @jax.jit
  def run(*arrays):
    how = functools.partial(
      attention, *arrays, rows, rows, ones, ones, is_causal=False
    )
    return how(implementation='auto'), how()

  got, want = run(*arrays)
  np.testing.assert_allclose(got, want, atol=1e-5)


def across(query, key, value, query_segments, key_segments, **how):
  at, of_key = jnp.zeros_like(query_segments), jnp.zeros_like(key_segments)
  return attention(
    query, key, value, at, of_key, query_segments, key_segments,
    is_causal=False, **how,
  )  # fmt: skip


def test_a_stream_reads_another_by_its_segments():
  """Of other length; what is no key of any is read as nothing."""
  query, key, value = heads(5, 9)
  query_segments = np.array([[1, 1, 2, 3, 0], [1] * 5], np.int32)
  key_segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [0] * 9], np.int32)
  run = jax.jit(functools.partial(across))
  got = run(query, key, value, query_segments, key_segments)
  mask = query_segments[:, :, None] == key_segments[:, None]
  mask &= key_segments[:, None] > 0
  np.testing.assert_allclose(got, by_hand(query, key, value, mask), atol=1e-5)
  assert (np.asarray(got)[0, 3:] == 0).all()
  assert (np.asarray(got)[1] == 0).all()

  gradients = jax.jit(jax.grad(lambda *x: run(*x).sum(), (0, 1, 2)))(
    query, key, value, query_segments, key_segments
  )
  assert all(np.isfinite(x).all() for x in gradients)


def test_any_mesh_gives_the_same():
  rng = np.random.default_rng(0)
  shapes = [(4, 5, 4, 4), (4, 7, 2, 4), (4, 7, 2, 4)]
  arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
  ids = [np.ones((4, n), np.int32) for n in (5, 7)]
  want = jax.jit(across)(*arrays, *ids)
  with jax.set_mesh(mesh.make_mesh(2, 2, 2)):
    placed = [jax.device_put(x, mesh.act('BTNH')) for x in arrays]
    ids = [jax.device_put(x, mesh.act('BT')) for x in ids]
    got = jax.jit(across)(*placed, *ids)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_one_of_reach_and_no_causality():
  arrays = on_device(*heads(T, T), *[SEGMENTS] * 4)
  with pytest.raises(UserError, match='is_causal is False: give one'):
    attention(*arrays, reach=arrays[-1], is_causal=False)
