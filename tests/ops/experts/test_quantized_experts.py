# SPDX-License-Identifier: Apache-2.0
"""Products with quantized experts equal those of their numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse.ops.experts import grouped_matmul as ops
from jaxsparse.ops.experts.expert_mlp import expert_mlp
from jaxsparse.ops.quantized_matrix import KINDS, QuantizedMatrix, encoded

S, X, D, F = 53, 5, 32, 24
RNG = np.random.default_rng(0)


def normal(*shape):
  return jax.device_put(RNG.normal(size=shape).astype(np.float32))


def integers(values):
  return jax.device_put(np.array(values, np.int32))


ROWS, EXPERTS = normal(S, D), normal(X, D, F)


@functools.cache
def experts_of(kind):
  return encoded(EXPERTS, kind, (1,), 16)


def equal(actual, expected):
  bound = 1e-5 * np.abs(expected).max()
  np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


SIZES = {'uneven': [1, 0, 30, 3, 2], 'all on the last': [0, 0, 0, 0, S]}


@pytest.mark.parametrize(
  ('kind', 'is_steady'),
  few([('int4', True)], [(k, s) for k in KINDS for s in (False, True)]),
)
def test_grouped_equals_that_of_the_numbers(kind, is_steady):
  experts = experts_of(kind)
  run = jax.jit(functools.partial(ops.grouped_matmul, is_steady=is_steady))
  for sizes in SIZES.values():
    args = ROWS, experts.dequantized(), integers(sizes)
    equal(
      run(ROWS, experts, integers(sizes)), ops.grouped_matmul_reference(*args)
    )


@pytest.mark.parametrize('kind', few(['int8', 'int4'], KINDS))
def test_assigned_equals_that_of_the_numbers(kind):
  experts, expert = experts_of(kind), integers([3, 0, 3, 4])
  equal(
    jax.jit(ops.assigned_matmul)(ROWS[:4], experts, expert),
    ops.assigned_matmul_reference(ROWS[:4], experts.dequantized(), expert),
  )


def test_rows_get_gradients_and_the_experts_none():
  experts = experts_of('int4')

  def gradient(product, experts, which):
    def loss(rows):
      return jnp.square(product(rows, experts, which)).sum()

    return jax.jit(jax.grad(loss))(ROWS[:4])

  which = integers([3, 0, 3, 4])
  numbers = experts.dequantized()
  equal(
    gradient(ops.assigned_matmul, experts, which),
    gradient(ops.assigned_matmul_reference, numbers, which),
  )
  sizes = integers([1, 0, 2, 1, 0])
  equal(
    gradient(ops.grouped_matmul, experts, sizes),
    gradient(ops.grouped_matmul_reference, numbers, sizes),
  )


@pytest.mark.parametrize('num_tokens', [2, 256])
def test_no_program_holds_all_experts_in_numbers(num_tokens):
  num_experts, width, inner = 64, 128, 256
  matrices = {
    name: QuantizedMatrix(
      jax.ShapeDtypeStruct((num_experts, d // 32, 16, f), np.uint8),
      jax.ShapeDtypeStruct((num_experts, d // 32, 1, f), np.float32),
      'int4',
      1,
    )
    for name, (d, f) in dict(
      up=(width, inner), gate=(width, inner), down=(inner, width)
    ).items()
  }
  x = jax.ShapeDtypeStruct((num_tokens, width), np.float32)
  weights = jax.ShapeDtypeStruct((num_tokens, 4), np.float32)
  experts = jax.ShapeDtypeStruct((num_tokens, 4), np.int32)
  compiled = jax.jit(expert_mlp).lower(x, weights, experts, matrices).compile()
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes < num_experts * width * inner * 4 / 1.5
