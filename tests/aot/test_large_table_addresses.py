# SPDX-License-Identifier: Apache-2.0
"""GPU kernels reach every row of tables beyond 2^31 and 2^32 elements.

A thread of each kernel is run on paper, for the first row and for others: each
address must move by exactly the distance of the rows, in 64 bits. Where the
tables have 2^31 to 2^32 elements the compiler counts in unsigned 32 bits, which
is just enough.

Run with `pytest -m aot`, extra `aot`.
"""

import jax
import jax.numpy as jnp
import ptx
import pytest
import targets

from jaxsparse.ops.memory.row_gradient import RowGradient
from jaxsparse.ops.memory.value_bag import value_bag
from jaxsparse.training.optimizers import row_updates

pytestmark = pytest.mark.aot

W, T, k = 512, 64, 4
NUM_ROWS = {'above_2_31': 5 * 2**20, 'above_2_32': 9 * 2**20}
tables = pytest.mark.parametrize('num_rows', NUM_ROWS.values(), ids=NUM_ROWS)
dtypes = pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])


def _assert_reaches_every_row(program, row_bytes, num_rows, num_arguments=1):
  moved = set()
  for block, thread in ((0, 0), (3, 77)):
    first = ptx.accesses(program.ptx, 0, block, thread)
    for row in (1, 2**31 // W, 2**32 // W, num_rows - 1):
      row = min(row, num_rows - 1)
      for (place, start), (same, offset) in zip(
        first, ptx.accesses(program.ptx, row, block, thread), strict=True
      ):
        assert place == same
        assert offset - start in (0, row * row_bytes)
        if offset != start:
          moved.add(place)
  assert len(moved) == num_arguments


@tables
@dtypes
def test_forward(num_rows, dtype, tmp_path):
  table, slot, weight = _bag(num_rows, dtype)
  program = targets.compile_for(
    'h100', value_bag, table, slot, weight, dump=tmp_path
  )
  _assert_reaches_every_row(program, W * dtype.dtype.itemsize, num_rows)


@tables
def test_table_gradient(num_rows, tmp_path):
  table, slot, weight = _bag(num_rows, jnp.float32)
  cotangent = jax.ShapeDtypeStruct((T, 1, W), jnp.float32)

  def gradient(table, slot, weight, cotangent):
    return jax.vjp(lambda t: value_bag(t, slot, weight), table)[1](cotangent)

  program = targets.compile_for(
    'h100', gradient, table, slot, weight, cotangent, dump=tmp_path
  )
  _assert_reaches_every_row(program, W * 4, num_rows)


@tables
def test_row_updates(num_rows, tmp_path):
  table = jax.ShapeDtypeStruct((num_rows, W), jnp.float32)
  rows = jax.ShapeDtypeStruct((T,), jnp.int32)
  values = jax.ShapeDtypeStruct((T, W), jnp.float32)
  program = targets.compile_for(
    'h100',
    lambda table, slot, value: row_updates.apply_updates(
      table, RowGradient(slot, value)
    ),
    table,
    rows,
    values,
    donate=(0,),
    dump=tmp_path,
  )
  assert program.alias_bytes == num_rows * W * 4
  assert program.temp_bytes < 2**20
  # One kernel reads the rows, the other writes them.
  _assert_reaches_every_row(program, W * 4, num_rows, num_arguments=2)


def _bag(num_rows, dtype):
  shape = jax.ShapeDtypeStruct
  return (
    shape((num_rows, W), dtype),
    shape((T, k), jnp.int32),
    shape((T, k, 1), jnp.float32),
  )
