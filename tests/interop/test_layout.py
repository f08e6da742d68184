# SPDX-License-Identifier: Apache-2.0
"""A layout uses every tensor once, and is the same table in both directions."""

import numpy as np
import pytest

from jaxsparse.interop.layout import Part, as_is, stacked, tensors, transposed


def thirds(*places):
  """Leaves that are thirds of one tensor."""
  parts = (Part('qkv', (6, 4), (3, 2, 4), (place,)) for place in places)
  return {f'{i}': as_is(part) for i, part in enumerate(parts)}


def test_parts_make_up_a_tensor():
  assert tensors(thirds(0, 1, 2)) == {'qkv': (6, 4)}


@pytest.mark.parametrize('places', [(0, 1), (0, 1, 2, 2)])
def test_parts_that_do_not(places):
  with pytest.raises(ValueError, match='of the 24 numbers of qkv are used'):
    tensors(thirds(*places))


LEAVES = {
  'as_is': as_is(Part('x', (6,)), (2, 3)),
  'a part': as_is(Part('x', (6, 4), (3, 2, 4), (slice(None), 1)), (4, 3)),
  'transposed': transposed(Part('x', (6, 4)), (4, 2, 3)),
  'some rows': transposed(Part('x', (6, 4), index=(slice(2, 6),))),
  'stacked': stacked([transposed(Part(f'x{i}', (6, 4))) for i in range(3)]),
}


@pytest.mark.parametrize('name', LEAVES)
def test_what_goes_out_comes_back(name):
  leaf, rng = LEAVES[name], np.random.default_rng(0)
  theirs = [rng.normal(size=part.whole) for part in leaf.sources]
  parts = [part.of(x) for part, x in zip(leaf.sources, theirs, strict=True)]
  ours = leaf.to_ours(parts)
  for part, before, after in zip(
    leaf.sources, parts, leaf.to_theirs(ours), strict=True
  ):
    assert after.shape == part.shape
    np.testing.assert_array_equal(before, after)


def test_a_matrix_of_others_is_transposed():
  w = np.arange(24).reshape(6, 4)
  leaf = LEAVES['transposed'].to_ours([w])
  # Output 4 is width 1 of head 1.
  np.testing.assert_array_equal(leaf[:, 1, 1], w[4])
