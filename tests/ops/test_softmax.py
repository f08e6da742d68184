# SPDX-License-Identifier: Apache-2.0
import jax
import numpy as np

from jaxsparse.ops.softmax import softmax


def test_equals_jax_with_its_gradient():
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    scores = 5 * rng.normal(size=(3, 4, 33))
    # As masks leave them.
    scores[0, 0, 5:] = scores[1] = -1e30
    cotangent = rng.normal(size=scores.shape)

    @jax.jit
    def both(scores):
      results = (jax.vjp(f, scores) for f in (softmax, jax.nn.softmax))
      return [(y, vjp(cotangent)[0]) for y, vjp in results]

    got, expected = both(scores)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14),
      got,
      expected,
    )
