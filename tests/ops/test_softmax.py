# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.ops.softmax import softmax


def test_equals_jax_with_its_gradient():
  with jax.enable_x64(True):
    scores = 5 * jax.random.normal(jax.random.key(0), (3, 4, 33), jnp.float64)
    # As masks leave them.
    scores = scores.at[0, 0, 5:].set(-1e30).at[1].set(-1e30)
    cotangent = jax.random.normal(jax.random.key(1), scores.shape, jnp.float64)
    got, expected = (
      (y, vjp(cotangent)[0])
      for y, vjp in (jax.vjp(f, scores) for f in (softmax, jax.nn.softmax))
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14),
      got,
      expected,
    )
