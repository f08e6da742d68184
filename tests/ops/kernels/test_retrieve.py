# SPDX-License-Identifier: Apache-2.0
"""Retrieval in one kernel, interpreted on a CPU, is that of `tucker_top_m`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse.ops.kernels import bits
from jaxsparse.ops.kernels import retrieve as kernel

T, P, Q, K = 2, 2, 24, 6


def make_inputs(num_ranks, num_cores, num_parts):
  """Numbers of few bits: sums are exact in whatever order they are taken.

  Interpreted, XLA takes them anew for each use, and may round otherwise.
  """
  rng = np.random.default_rng(0)

  def draw(scale, *shape):
    return jnp.asarray(np.round(rng.normal(size=shape) * scale) / scale, 'f4')

  scores = draw(64, 2, num_ranks * num_parts, T, P, Q)
  cores = draw(16, num_cores, P, num_ranks, num_ranks)
  directions = draw(16, P, num_ranks), draw(16, P, num_ranks)
  return scores, cores, directions


@functools.partial(jax.jit, static_argnames=('num_slots', 'salt'))
def both(scores, cores, directions, factor, num_slots, salt):
  options = dict(num_slots=num_slots, salt=salt)
  args = scores, cores, directions, factor, K
  return (
    kernel.retrieve(*args, **options, interpret=True),
    kernel.retrieve_reference(*args, **options),
  )


def by_slot(cells):
  """Cells of each token in the order of their addresses."""
  scores, slot, block = map(np.asarray, cells)
  scores = scores.reshape(*slot.shape, -1)
  order = np.lexsort((slot, block))
  return [
    np.take_along_axis(slot, order, 1),
    np.take_along_axis(block, order, 1),
    np.take_along_axis(scores, order[..., None], 1),
  ]


@pytest.mark.parametrize(
  'sizes', few([((2, 1, 2),)], [((2, 1, 2),), ((3, 2, 1),)])
)
def test_it_keeps_the_same_cells(sizes):
  factor = jnp.asarray([[1, 2], [0.5, 1]])
  got, expected = both(*make_inputs(*sizes), factor, Q**2 // 4, 7)
  assert len(np.unique(expected[2])) == 4
  for a, b in zip(by_slot(got), by_slot(expected), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('m', [1, 5, 8])
def test_the_largest_are_found_with_ties_in_order(m):
  rng = np.random.default_rng(1)
  rows = rng.normal(size=(6, 64)).astype(np.float32)
  rows[0], rows[1], rows[2] = 1, rows[1].round(), -np.abs(rows[2])
  rows[3, ::3], rows[4] = np.nan, rows[4] * 1e30
  order, found = jax.jit(
    lambda rows: (
      bits.ordered(rows),
      jax.vmap(lambda x: bits.best_places(x, m))(bits.ordered(rows)),
    )
  )(rows)
  assert np.asarray(order).min() > 0
  is_kept, place = map(np.asarray, found)
  clean = np.where(np.isnan(rows), 0, rows)
  for i, row in enumerate(clean):
    expected = np.sort(np.argsort(-row, kind='stable')[:m])
    np.testing.assert_array_equal(np.nonzero(is_kept[i])[0], expected)
    np.testing.assert_array_equal(place[i, expected], np.arange(m))


def test_a_gradient_is_that_of_the_reference():
  scores, cores, directions = make_inputs(1, 1, 1)

  def gradient(function, **options):
    def loss(scores, cores):
      args = scores, cores, directions, None, K
      return (function(*args, num_slots=Q, **options)[0] ** 2).sum()

    return jax.jit(jax.grad(loss, (0, 1)))(scores, cores)

  got = gradient(kernel.retrieve, interpret=True)
  expected = gradient(kernel.retrieve_reference)
  for a, b in zip(got, expected, strict=True):
    assert np.any(np.asarray(b))
    np.testing.assert_allclose(a, b, rtol=1e-5)


def test_what_it_does_not_serve():
  scores, cores, directions = make_inputs(1, 1, 1)

  def why(num_keys=Q, num_selected=K):
    wide = jnp.zeros((*scores.shape[:-1], num_keys))
    return str(
      kernel.unsupported_reason(
        wide, cores, directions, None, num_selected, num_slots=Q
      )
    )

  assert 'this is cpu' in why()
  assert '20000 keys' in why(20_000)
  assert 'cells' in why(num_selected=200)
