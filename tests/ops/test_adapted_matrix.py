# SPDX-License-Identifier: Apache-2.0
"""A product with an adapted matrix is that with the merged one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import mesh
from jaxsparse.ops import quantized_matrix
from jaxsparse.ops.adapted_matrix import (
  AdaptedMatrix,
  adapted_product_reference,
)
from jaxsparse.ops.experts.expert_mlp import expert_mlp, expert_mlp_reference
from jaxsparse.ops.token_product import token_product

R = 3
# Letters of a product, and the dimensions of tokens and matrix.
PRODUCTS = {
  'd,dnh->nh': ('D', 'DNH', (0,)),
  'gh,ghd->d': ('NH', 'NHD', (0, 1)),
  'd,vd->v': ('D', 'VD', (1,)),
}
SIZES = dict(d=8, g=4, n=4, h=2, v=6)


def draw(*shape, seed=0):
  rng = np.random.default_rng([seed, *shape])
  return jnp.asarray(rng.standard_normal(shape, dtype=np.float32))


def make(letters, num=0, **more):
  """Tokens, and a matrix with an adapter or with several."""
  _, _, contracted = PRODUCTS[letters]
  left, right = letters.split('->')[0].split(',')
  shape = [SIZES[i] for i in right]
  first = (num,) if num else ()
  read = [shape[i] for i in contracted]
  written = [n for i, n in enumerate(shape) if i not in contracted]
  matrix = AdaptedMatrix(
    draw(*shape),
    draw(*first, *read, R, seed=1),
    draw(*first, R, *written, seed=2),
    scale=0.5,
    contracted=contracted,
    **more,
  )
  return draw(4, 3, *(SIZES[i] for i in left), seed=3), matrix


def close(actual, expected):
  np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-5)


def with_magnitude(matrix):
  return dataclasses.replace(matrix, magnitude=1.5 * matrix.norm())


@pytest.mark.parametrize('letters', PRODUCTS)
@pytest.mark.parametrize('kind', ['lora', 'dora', 'nf4'])
def test_factored_is_merged(letters, kind):
  x, matrix = make(letters)
  if kind == 'dora':
    matrix = with_magnitude(matrix)
  if kind == 'nf4':
    stored = quantized_matrix.encoded(matrix.base, 'nf4', matrix.contracted, 2)
    numbers = dataclasses.replace(matrix, base=stored.dequantized())
    matrix = dataclasses.replace(matrix, base=stored)
    close(matrix.merged(), numbers.merged())
    matrix = numbers
  found = token_product(letters, x, matrix)
  close(found, adapted_product_reference(letters, x, matrix))


@pytest.mark.parametrize('letters', PRODUCTS)
def test_each_sequence_has_its_own_adapter(letters):
  x, matrix = make(letters, num=3, chosen=jnp.array([2, 0, 1, 2], jnp.int32))
  found = token_product(letters, x, matrix)
  close(found, adapted_product_reference(letters, x, matrix))


def test_a_new_adapter_changes_no_bit():
  x, matrix = make('d,dnh->nh')
  new = dataclasses.replace(matrix, b=jnp.zeros_like(matrix.b))
  plain = token_product('d,dnh->nh', x, matrix.base)
  np.testing.assert_array_equal(token_product('d,dnh->nh', x, new), plain)
  same = dataclasses.replace(new, magnitude=new.norm())
  close(token_product('d,dnh->nh', x, same), plain)


def test_the_norm_of_dora_has_no_gradient():
  x, matrix = make('d,dnh->nh')
  matrix = with_magnitude(matrix)

  def loss(b, is_free):
    changed = dataclasses.replace(matrix, b=b)
    norm = changed.norm()
    norm = norm if is_free else jax.lax.stop_gradient(norm)
    w = changed.base + changed.scale * jnp.tensordot(changed.a, b, 1)
    w *= (matrix.magnitude / norm)[None]
    return jnp.sum(jnp.sin(jnp.tensordot(x, w, 1)))

  def ours(b):
    changed = dataclasses.replace(matrix, b=b)
    return jnp.sum(jnp.sin(token_product('d,dnh->nh', x, changed)))

  found = jax.grad(ours)(matrix.b)
  close(found, jax.grad(loss)(matrix.b, False))
  assert not np.allclose(found, jax.grad(loss)(matrix.b, True), atol=1e-3)


def test_dropout_is_of_the_inputs_of_the_adapter():
  x, matrix = make('d,dnh->nh')
  key = jax.random.key(0)
  dropping = dataclasses.replace(matrix, key=key, dropout=0.5)
  keep = jax.random.bernoulli(key, 0.5, x.shape)
  seen = jnp.where(keep, x / 0.5, 0)
  expected = token_product('d,dnh->nh', x, matrix.base) + 0.5 * jnp.einsum(
    'btd,dr,rnh->btnh', seen, matrix.a, matrix.b
  )
  close(token_product('d,dnh->nh', x, dropping), expected)


@pytest.mark.parametrize(
  ('letters', 'is_partial', 'kind'),
  [
    ('d,dnh->nh', False, 'lora'),
    ('gh,ghd->d', False, 'lora'),
    ('gh,ghd->d', True, 'lora'),
    ('gh,ghd->d', True, 'several'),
    ('gh,ghd->d', False, 'dora'),
  ],
)
def test_a_mesh_keeps_its_rules(letters, is_partial, kind):
  several = dict(num=3, chosen=jnp.array([2, 0, 1, 2], jnp.int32))
  x, matrix = make(letters, **(several if kind == 'several' else {}))
  if kind == 'dora':
    matrix = with_magnitude(matrix)
  left, dims, _ = PRODUCTS[letters]
  out = 'D' if letters.endswith('d') else 'NH'
  expected = adapted_product_reference(letters, x, matrix)
  devices = mesh.make_mesh(2, 1, 2, devices=jax.devices()[:4])
  with jax.set_mesh(devices):

    def lay(x, of):
      return jax.device_put(x, jax.NamedSharding(devices, of))

    x = lay(x, mesh.act('BT' + left))
    placed = matrix.specs(mesh.param(dims))
    laid = {
      name: lay(getattr(matrix, name), getattr(placed, name))
      for name in ('base', 'a', 'b', 'magnitude')
      if getattr(matrix, name) is not None
    }
    matrix = dataclasses.replace(matrix, **laid)
    if matrix.chosen is not None:
      matrix = dataclasses.replace(
        matrix, chosen=lay(matrix.chosen, mesh.act('B'))
      )

    @jax.jit
    def run(x, matrix):
      base = mesh.gather(matrix.base, dims)
      matrix = matrix.gathered(dims, base)
      spec = mesh.partial('BTD') if is_partial else mesh.act('BT' + out)
      y = token_product(letters, x, matrix, out_sharding=spec)
      return mesh.reshard(y, mesh.act('BT' + out))

    close(run(x, matrix), expected)
    merged = jax.jit(AdaptedMatrix.merged)
    if matrix.chosen is None:
      assert merged(matrix).sharding.spec == mesh.param(dims)


@pytest.mark.parametrize('num_tokens', [2, 12])
def test_experts_have_adapters_of_their_own(num_tokens):
  x, weights = draw(num_tokens, 8), jnp.abs(draw(num_tokens, 2, seed=1))
  experts = jnp.asarray(
    np.random.default_rng(0).integers(0, 5, (num_tokens, 2)), jnp.int32
  )

  def adapted(rows, width):
    return AdaptedMatrix(
      draw(5, rows, width),
      draw(5, rows, R, seed=1),
      draw(5, R, width, seed=2),
      scale=0.5,
      contracted=(1,),
      num_experts=1,
    )

  matrices = dict(up=adapted(8, 6), gate=adapted(8, 6), down=adapted(6, 8))
  merged = {name: m.merged() for name, m in matrices.items()}
  expected = expert_mlp_reference(x, weights, experts, merged)
  close(expert_mlp(x, weights, experts, matrices), expected)
