# SPDX-License-Identifier: Apache-2.0
"""What a GPU and a TPU execute for a bag of a quantized table: no copy of it.

Run with `pytest -m aot`, extra `aot`; see `targets` for what this can prove.
"""

import jax
import jax.numpy as jnp
import pytest
import targets

from jaxsparse.ops import chunking
from jaxsparse.ops.memory.gathered_dot import gathered_dot
from jaxsparse.ops.memory.value_bag import value_bag
from jaxsparse.ops.tables.quantized_table import QuantizedTable
from jaxsparse.ops.tables.row_format import code_bytes, row_bytes

pytestmark = pytest.mark.aot

# On a TPU more than fast memory, where the compiler would keep the table.
M, W, k = 2**20, 256, 32
CELLS = [(64, 1, 1, False), (4096, 1, 1, False), (4096, 2, 4, True)]
cells = pytest.mark.parametrize('cell', CELLS, ids=str)
kinds = pytest.mark.parametrize('kind', ['int8', 'int4'])
shape = jax.ShapeDtypeStruct


def table(kind, is_apart):
  if not is_apart:
    stored = shape((M, row_bytes(W, kind)), jnp.uint8)
    return QuantizedTable(stored, W, kind)
  stored = shape((M, code_bytes(W, kind)), jnp.uint8)
  return QuantizedTable(stored, W, kind, scale=shape((M, 1), jnp.float32))


def bag_program(target, table, cell):
  num_tokens, num_cores, num_pools, has_num_valid = cell

  def bag(table, slot, weight, pool, num_valid):
    return value_bag(table, slot, weight, pool, num_pools, num_valid=num_valid)

  return targets.compile_for(
    target,
    bag,
    table,
    shape((num_tokens, k), jnp.int32),
    shape((num_tokens, k, num_cores), jnp.float32),
    shape((num_tokens, k), jnp.int32) if num_pools > 1 else None,
    shape((num_tokens,), jnp.int32) if has_num_valid else None,
  )


@cells
@kinds
def test_gpu_bag_holds_neither_the_table_nor_rows(kind, cell):
  program = bag_program('h100', table(kind, is_apart=False), cell)
  # Of few tokens, the rows and with pools their products.
  assert program.temp_bytes <= max(1.25 * 64 * k * W * 4, 2**23)


@cells
@kinds
def test_tpu_bag_holds_neither_the_table_nor_rows(kind, cell):
  program = bag_program('v5e', table(kind, is_apart=True), cell)
  assert program.temp_bytes <= 1.1 * chunking.CHUNK_BYTES


@kinds
@pytest.mark.parametrize('target', ['h100', 'v5e'])
def test_products_hold_neither_the_table_nor_rows(target, kind):
  program = targets.compile_for(
    target,
    gathered_dot,
    table(kind, is_apart=target == 'v5e'),
    shape((4096, k), jnp.int32),
    shape((4096, W), jnp.float32),
  )
  assert program.temp_bytes <= 2**20


def test_with_scales_in_its_rows_a_tpu_would_copy_the_table():
  inside = table('int8', is_apart=False)
  program = bag_program('v5e', inside, CELLS[1])
  assert program.temp_bytes >= inside.nbytes
