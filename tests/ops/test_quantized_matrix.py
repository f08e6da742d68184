# SPDX-License-Identifier: Apache-2.0
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import mesh as mesh_lib
from jaxsparse.config.errors import UserError
from jaxsparse.ops import quantized_matrix as matrices

RNG = np.random.default_rng(0)

# By one program, and not by one of each operation.
numbers_of = jax.jit(matrices.QuantizedMatrix.dequantized, static_argnums=1)


def normal(*shape):
  return jax.device_put(RNG.normal(size=shape).astype(np.float32))


def relative_error(values, kind, *args):
  decoded = numbers_of(matrices.encoded(values, kind, *args))
  values = np.asarray(values)
  return np.linalg.norm(decoded - values) / np.linalg.norm(values)


# Of normal numbers.
@pytest.mark.parametrize(
  ('kind', 'group', 'error'),
  [('int8', 64, 0.0078), ('int4', 64, 0.108), ('nf4', 64, 0.092)],
)
def test_the_error_of_normal_matrices(kind, group, error):
  values = normal(1024, 48)
  assert relative_error(values, kind, (0,), group) == pytest.approx(
    error, rel=0.05
  )


def test_a_golden_group_of_nf4():
  row = np.float32([0.1, -0.7, 0.35, 0, 0.69, -0.06, 0.2, -0.2])[:, None]
  matrix = matrices.encoded(jax.device_put(row), 'nf4', (0,), 8)
  codes = [9, 0, 12, 7, 15, 6, 10, 4]
  expected = [
    low | high << 4 for low, high in zip(codes[:4], codes[4:], strict=True)
  ]
  assert np.asarray(matrix.codes).ravel().tolist() == expected
  assert np.asarray(matrix.scale).ravel().tolist() == [np.float32(0.7)]


def test_a_golden_group_of_int4_is_a_golden_row_of_a_table():
  row = np.float32([0.1, -0.7, 0.35, 0, 0.69, -0.06, 0.2, -0.2])[None]
  matrix = matrices.encoded(jax.device_put(row), 'int4', (1,), 8)
  codes = np.asarray(matrix.codes).ravel().tolist()
  assert codes == [0x71, 0xF9, 0x24, 0xE0]


# As they are among a model's parameters.
SHAPES = {
  'query': ((32, 4, 8), (0,)),
  'output': ((4, 8, 24), (0, 1)),
  'experts': ((3, 16, 12), (1,)),
  'embedding': ((11, 16), (1,)),
}


@pytest.mark.parametrize(
  ('name', 'kind'), list(itertools.product(SHAPES, matrices.KINDS))
)
def test_decoding_equals_group_by_group(name, kind):
  shape, contracted = SHAPES[name]
  matrix = matrices.encoded(normal(*shape), kind, contracted, 8)
  assert matrix.shape == shape
  assert matrix.group == (0 if kind == 'int8' else 8)
  numbers = np.asarray(numbers_of(matrix))
  np.testing.assert_array_equal(numbers, matrices.dequantized_reference(matrix))
  half = numbers_of(matrix, jnp.bfloat16)
  np.testing.assert_array_equal(half, numbers.astype(jnp.bfloat16))
  assert matrix.nbytes == matrix.codes.nbytes + matrix.scale.nbytes


def test_a_channel_has_a_scale_over_all_that_is_summed():
  matrix = matrices.encoded(normal(4, 8, 24), 'int8', (0, 1))
  assert matrix.scale.shape == (1, 1, 24)
  experts = matrices.encoded(normal(3, 16, 12), 'int8', (1,))
  assert experts.scale.shape == (3, 1, 12)


def test_zeros_stay_zeros():
  for kind in matrices.KINDS:
    matrix = matrices.encoded(jnp.zeros((8, 4)), kind, (0,), 8)
    assert not np.any(numbers_of(matrix))


def test_groups_are_as_long_as_fits_and_of_an_even_number():
  assert matrices.encoded(normal(48, 2), 'int4', (0,), 32).group == 16
  odd = matrices.encoded(normal(7, 2), 'int4', (0,))
  assert odd.kind == 'int8'


@pytest.mark.parametrize('kind', matrices.KINDS)
def test_on_a_mesh_a_matrix_stays_as_it_lies(kind):
  values = normal(64, 16, 4)
  whole = matrices.encoded(values, kind, (0,), 8)
  with jax.set_mesh(mesh_lib.make_mesh(2, 2, 2)):
    placed = jax.device_put(values, mesh_lib.param('DNH'))
    split = matrices.encoded(placed, kind, (0,), 8)
    assert split.codes.sharding.spec[0] == 'data'
    assert 'model' in split.codes.sharding.spec
    spec = mesh_lib.gathered('DNH')
    gathered = jax.jit(
      lambda x: x.gathered('DNH').dequantized(jnp.float32, spec)
    )(split)
    assert jax.typeof(gathered).sharding.spec == mesh_lib.gathered('DNH')
  np.testing.assert_array_equal(gathered, numbers_of(whole))


def test_an_unknown_kind_is_refused():
  with pytest.raises(UserError, match="kind = 'int3' must be one of 'int8'"):
    matrices.encoded(normal(4, 4), 'int3', (0,))
