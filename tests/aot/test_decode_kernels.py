# SPDX-License-Identifier: Apache-2.0
"""The kernels of a decode step, at the sizes of the 680M family, on an H100.

Run with `pytest -m aot`, extra `aot`. How fast they are only a device tells.
"""

import jax
import jax.numpy as jnp
import launches
import ptx
import pytest
import targets

from jaxsparse.ops.kernels.attend import attend
from jaxsparse.ops.kernels.bag import bag
from jaxsparse.ops.kernels.few_experts import expert_mlp
from jaxsparse.ops.kernels.retrieve import retrieve
from jaxsparse.ops.tables.quantized_table import QuantizedTable
from jaxsparse.ops.tables.row_format import row_bytes

pytestmark = pytest.mark.aot

BF16, F32, INT = jnp.bfloat16, jnp.float32, jnp.int32
SHAPE = jax.ShapeDtypeStruct
B = 64


def compiled(function, *args, folder, donate=()):
  """The program and its kernels, none of which lacks registers."""
  dump = folder / 'dump'
  dump.mkdir()
  program = targets.compile_for(
    'h100', function, *args, donate=donate, dump=dump
  )
  assert ptx.spilled_bytes(program.ptx, folder) == 0
  return program, launches.kernels(program.text)


def test_retrieval_is_one_kernel(tmp_path):
  def run(scores, cores, left, right, factor):
    directions = left, right
    return retrieve(
      scores, cores, directions, factor, 42, num_slots=1632**2, salt=1
    )

  program, kernels = compiled(
    run,
    SHAPE((2, 2, B, 2, 3264), F32),
    SHAPE((2, 2, 2, 2), F32),
    *[SHAPE((2, 2), F32)] * 2,
    SHAPE((B, 2), F32),
    folder=tmp_path,
  )
  assert len(kernels) == 1
  # What it has found, on its way from one thread to the others.
  assert program.temp_bytes < 2**17


@pytest.mark.parametrize('stored', ['bfloat16', 'int8', 'int4'])
def test_a_bag_is_one_kernel(stored, tmp_path):
  width = 768
  table = SHAPE((2**18, width), BF16)
  if stored != 'bfloat16':
    codes = SHAPE((2**18, row_bytes(width, stored)), jnp.uint8)
    table = QuantizedTable(codes, width, stored)
  program, kernels = compiled(
    lambda *args: bag(*args, num_pools=4),
    table,
    SHAPE((B, 84), INT),
    SHAPE((B, 84, 2), F32),
    SHAPE((B, 84), INT),
    folder=tmp_path,
  )
  assert len(kernels) == 1
  assert program.temp_bytes == 0
  assert any(
    '.v4.' in load or '.v2.' in load for load in ptx.loads(program.ptx)
  )


@pytest.mark.parametrize('num_tokens', [2, 64, 256])
def test_experts_are_two_kernels_and_a_sum(num_tokens, tmp_path):
  width, inner, num_experts = 1536, 3520, 34
  matrices = dict(
    up=SHAPE((num_experts, width, inner), BF16),
    down=SHAPE((num_experts, inner, width), BF16),
  )
  program, kernels = compiled(
    expert_mlp,
    SHAPE((num_tokens, width), BF16),
    SHAPE((num_tokens, 2), F32),
    SHAPE((num_tokens, 2), INT),
    matrices,
    folder=tmp_path,
  )
  assert len(kernels) == 3
  rows = 2 * num_tokens * (2 * inner + 4 * width)
  assert program.temp_bytes < 1.1 * rows
  assert 'mma.sync' in program.ptx
  # Matrices come by copies of 16 bytes.
  assert ', 0x10' in program.ptx


@pytest.mark.parametrize(('batch_size', 'most'), [(2, 4), (64, 2), (256, 1)])
def test_attention_is_one_kernel_and_what_merges_its_parts(
  batch_size, most, tmp_path
):
  frequency, row = SHAPE((48,), F32), SHAPE((batch_size,), INT)
  cache = SHAPE((batch_size, 2, 2080, 96), BF16)
  program, kernels = compiled(
    lambda *args: attend(*args, 16),
    SHAPE((batch_size, (16 + 2 * 2) * 96), BF16),
    frequency, cache, cache, row, row,
    folder=tmp_path,
    donate=(2, 3),
  )  # fmt: skip
  assert len(kernels) <= most
  # The cache is where it was.
  assert program.alias_bytes == 2 * 2 * batch_size * 2 * 2080 * 96
  assert 'mma.sync' in program.ptx
  assert ', 0x10' in program.ptx
