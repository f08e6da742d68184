# SPDX-License-Identifier: Apache-2.0
"""A product whose gradient turns over the smaller side is the product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.ops import cpu

SIZES = dict(b=2, k=2, g=3, t=5, s=7, h=4, p=2, q=6, r=2)


@pytest.mark.parametrize(
  'letters',
  [
    'bkgth,bksh->bkgts',  # Scores: the left side is narrower than the result.
    'bkgts,bksh->bkgth',  # Sums of values: the result is.
    'tk,pqkr->tpqr',
    'tpk,qkr->tpqr',
    'trk,pqkr->tpqr',
  ],
)
def test_it_has_the_gradients_of_einsum(letters):
  rng = np.random.default_rng(0)
  left, right, out = (
    rng.standard_normal([SIZES[i] for i in side], dtype=np.float32)
    for side in letters.replace('->', ',').split(',')
  )

  def both(left, right, out):
    pulls = [
      jax.vjp(lambda a, b, f=f: f(letters, a, b), left, right)
      for f in (cpu.product, jnp.einsum)
    ]
    return [(y, pull(out)) for y, pull in pulls]

  ours, expected = jax.jit(both)(left, right, out)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
    ours,
    expected,
  )
