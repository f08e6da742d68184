# SPDX-License-Identifier: Apache-2.0
"""Products on flattened tokens are those of the dimensions that tokens have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import mesh
from jaxsparse.ops.token_product import token_product, token_product_reference

# Letters of a product, and the last dimensions of the tokens and the matrix.
PRODUCTS = {
  'd,df->f': ('D', 'DF'),
  'gh,ghd->d': ('NH', 'NHD'),
  'd,dnh->nh': ('D', 'DNH'),
  'd,vd->v': ('D', 'VD'),
}
SIZES = dict(d=8, f=12, g=4, n=4, h=2, v=6)


def make(letters):
  rng = np.random.default_rng(0)
  left, right = letters.split('->')[0].split(',')

  def draw(*shape):
    return rng.standard_normal(shape, dtype=np.float32)

  x = draw(4, 3, *(SIZES[i] for i in left))
  return x, draw(*(SIZES[i] for i in right))


@pytest.mark.parametrize('letters', PRODUCTS)
def test_it_is_the_product_of_each_token(letters):
  def loss(product, x, matrix):
    y = product(letters, x, matrix)
    return jnp.sum(jnp.sin(y)), y

  def both(*args):
    return [
      jax.value_and_grad(
        lambda x, m, product=product: loss(product, x, m), (0, 1), has_aux=True
      )(*args)
      for product in (token_product, token_product_reference)
    ]

  ours, reference = jax.jit(both)(*make(letters))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
    ours,
    reference,
  )


@pytest.mark.parametrize(
  ('letters', 'is_partial'),
  [('d,dnh->nh', False), ('gh,ghd->d', False), ('gh,ghd->d', True)],
)
def test_a_mesh_keeps_its_rules(letters, is_partial):
  x, matrix = make(letters)
  tokens, weights = PRODUCTS[letters]
  writes = letters == 'gh,ghd->d'
  with jax.set_mesh(mesh.make_mesh(2, 1, 2, devices=jax.devices()[:4])):
    out = None
    if writes:
      out = mesh.partial('BTD') if is_partial else mesh.act('BTD')
    specs = []

    def run(x, matrix):
      y = token_product(letters, x, matrix, out_sharding=out)
      specs.append(jax.typeof(y).sharding.spec)
      return mesh.reshard(y, mesh.act('BTD')) if writes else y

    args = (x, mesh.act(f'BT{tokens}')), (matrix, mesh.gathered(weights))
    y = jax.jit(run)(*(mesh.reshard(jnp.asarray(a), spec) for a, spec in args))
  assert specs[0] == (
    out if writes else jax.P(mesh.TOKENS, None, 'model', None)
  )
  expected = jax.jit(token_product_reference, static_argnums=0)(
    letters, x, matrix
  )
  np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
