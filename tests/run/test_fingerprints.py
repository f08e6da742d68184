# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: every single change is noticed, and a change of places."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import mesh
from jaxsparse.run import fingerprints

DTYPES = ['float32', 'bfloat16', 'int32', 'uint8', 'bool']


def make(dtype, shape=(6, 10)):
  values = np.random.default_rng(0).integers(99, size=shape)
  return jnp.asarray(values.astype(jnp.dtype(dtype)))


@pytest.mark.parametrize('dtype', DTYPES)
def test_changes_are_noticed(dtype):
  x = make(dtype)
  before = fingerprints.of_arrays({'x': x})
  flat = np.array(x).flatten()
  bits = flat.view(np.uint8)

  def changed():
    return {'x': jnp.array(flat.reshape(x.shape))}

  assert fingerprints.of_arrays(changed()) == before
  rng = np.random.default_rng(0)
  for place in rng.integers(bits.size, size=20):
    bits[place] ^= 1
    assert fingerprints.of_arrays(changed()) != before
    bits[place] ^= 1
  one, other = next(
    (i, j) for i in range(60) for j in range(i) if flat[i] != flat[j]
  )
  flat[[one, other]] = flat[[other, one]]
  assert fingerprints.of_arrays(changed()) != before
  # A mere sum does not notice it.
  assert fingerprints.sums(changed()) == fingerprints.sums({'x': x})


def test_shape_and_dtype_count():
  x = make('int32')
  found = [
    fingerprints.of_arrays({'x': one})
    for one in (x, x.reshape(60), x.astype('uint32'), jnp.float32(0))
  ]
  assert [one['x'][0] for one in found] == [
    'int32[6, 10]', 'int32[60]', 'uint32[6, 10]', 'float32[]'
  ]  # fmt: skip
  assert found[0]['x'][1] == found[1]['x'][1] == found[2]['x'][1]


def test_names_are_paths():
  tree = {'a': [jnp.zeros(1), {'b': jnp.ones(2)}]}
  assert list(fingerprints.of_arrays(tree)) == ['a/0', 'a/1/b']


@pytest.mark.parametrize('shape', [(8, 1, 1), (2, 1, 4)])
def test_the_same_on_every_mesh(shape):
  def tree():
    return {'x': mesh.reshard(make('float32', (16, 32)), mesh.param('DF'))}

  alone = fingerprints.of_arrays(tree())
  with jax.set_mesh(mesh.make_mesh(*shape)):
    split = jax.jit(tree)()
    assert len(split['x'].sharding.device_set) == 8
    assert fingerprints.of_arrays(split) == alone


def test_seals():
  content = {'b': {1: 2.5, 'a': [None, (1, 2)]}, 'a': 'text'}
  sealed = fingerprints.seal(content)
  read = {'b': {'1': 2.5, 'a': [None, [1, 2]]}, 'a': 'text'}
  assert fingerprints.unseal(sealed | read) == read
  for broken in (sealed | {'a': 'test'}, sealed | {'c': 0}):
    with pytest.raises(ValueError, match='differs'):
      fingerprints.unseal(broken)
  assert fingerprints.unseal({'a': 1}) == {'a': 1}
