# SPDX-License-Identifier: Apache-2.0
"""What pictures of attention show, before it is drawn."""

import types

import numpy as np

from jaxsparse.analysis.attention_pictures import block_shares


def test_shares_of_blocks_are_means_of_tiles_rows():
  """Seven tokens in tiles of 2 and blocks of 3: the last ones are shorter."""
  weights = np.random.default_rng(0).uniform(size=(4, 7, 7))
  layer = types.SimpleNamespace(
    kind='sparse',
    uncomposed=None,
    weights=weights,
    choice={'kept': np.ones((2, 4))},
  )
  shares = block_shares(layer, 1, 3, 2)
  assert shares.shape == (3, 4)
  of_heads = weights[2:].mean(0)
  for block, keys in enumerate([slice(0, 3), slice(3, 6), slice(6, 7)]):
    for tile, rows in enumerate([slice(i, i + 2) for i in (0, 2, 4, 6)]):
      expected = of_heads[rows, keys].sum(1).mean()
      np.testing.assert_allclose(shares[block, tile], expected)
