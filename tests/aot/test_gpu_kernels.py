# SPDX-License-Identifier: Apache-2.0
"""Kernels for GPUs, what decoding runs there, and experts on TPUs, compiled.

Run with `pytest -m aot`, extra `aot`.
"""

import re

import jax
import jax.numpy as jnp
import pytest
import targets

from jaxsparse import mesh
from jaxsparse.nn.memory import key_scores
from jaxsparse.ops.experts import expert_mlp, grouped_matmul_libraries
from jaxsparse.ops.kernels import grouped_matmul as grouped
from jaxsparse.ops.kernels.decode_attention import decode_attention
from jaxsparse.ops.quantized_rows import QuantizedRows

pytestmark = pytest.mark.aot

BF16, INT = jnp.bfloat16, jnp.int32
SHAPE = jax.ShapeDtypeStruct


def wide_copies(ptx):
  """How many asynchronous copies to shared memory take 16 bytes each."""
  return len(re.findall(r'cp\.async\.c\w\.shared\.global [^;]*, 0x10', ptx))


@pytest.mark.parametrize('dtype', [BF16, jnp.float32])
def test_products_with_experts(dtype, tmp_path):
  args = (
    SHAPE((128, 1536), dtype), SHAPE((33, 1536, 3584), dtype), SHAPE((33,), INT)
  )  # fmt: skip
  program = targets.compile_for(
    'h100', lambda *args: grouped.grouped_matmul(*args), *args, dump=tmp_path
  )
  # Only the tiles' numbers: nothing is copied or cast.
  assert program.temp_bytes < 2**14
  assert wide_copies(program.ptx)
  assert ('mma.sync' in program.ptx) == (dtype == BF16)

  def loss(*args):
    return grouped.grouped_matmul(*args).astype(jnp.float32).sum()

  program = targets.compile_for('h100', jax.grad(loss, (0, 1)), *args)
  assert program.text.count('grouped_matmul') > 0
  assert program.text.count('grouped_outer_products') > 0


def gradient_of_split_experts(name, implementation):
  """Of a mixture of 8 experts on 8 devices, for tokens and matrices."""
  sizes, dims = (2, 2, 2), ('BTD', 'BT.', 'BT.')
  devices = targets.make_mesh(name, sizes)

  def place(shape, dtype, spec):
    sharding = jax.sharding.NamedSharding(devices, spec)
    return SHAPE(shape, dtype, sharding=sharding)

  with jax.set_mesh(devices):
    tokens = [
      place((8, 64, width), dtype, mesh.act(d))
      for width, dtype, d in zip(
        (256, 2, 2), (BF16, BF16, INT), dims, strict=True
      )
    ]
    matrices = {
      name: place((8, 256, 256), BF16, mesh.gathered(d))
      for name, d in (('up', 'XDF'), ('down', 'XFD'))
    }

  def loss(x, weights, experts, matrices):
    y = expert_mlp.sharded_expert_mlp(
      x, weights, experts, matrices, implementation=implementation
    )
    return y.astype(jnp.float32).sum()

  return targets.compile_for(
    name, jax.grad(loss, (0, 3)), *tokens, matrices, sizes=sizes
  )


def test_experts_split_over_devices_take_the_kernel(monkeypatch):
  monkeypatch.setattr(
    grouped_matmul_libraries, 'unsupported_reason', lambda *args: None
  )
  program = gradient_of_split_experts('h100', 'triton')
  assert 'grouped_outer_products' in program.text


def test_experts_split_over_tpus_have_a_kernel():
  program = gradient_of_split_experts('v5e', 'ragged_dot')
  # What XLA calls its kernel, and the masks by which it would multiply all
  # experts with all rows instead.
  assert 'ragged-dot-metadata' in program.text
  assert 'output_mask' not in program.text


@pytest.mark.parametrize('is_quantized', [False, True])
@pytest.mark.parametrize(
  ('batch', 'num_kv_heads', 'group', 'width'),
  [(64, 2, 8, 96), (1, 16, 1, 128)],
)
def test_attention_of_one_token(
  batch, num_kv_heads, group, width, is_quantized, tmp_path
):
  keys = SHAPE((batch, num_kv_heads, 2080, width), BF16)
  if is_quantized:
    scale = SHAPE(keys.shape[:-1], jnp.float32)
    keys = QuantizedRows(SHAPE(keys.shape, jnp.int8), scale)
  program = targets.compile_for(
    'h100',
    decode_attention,
    SHAPE((batch, num_kv_heads, group, width), BF16),
    keys,
    keys,
    *[SHAPE((batch,), INT), SHAPE((batch, 2080), INT)] * 2,
    dump=tmp_path,
  )
  scores = 4 * batch * num_kv_heads * group * 2080
  # What is put together at last, and not the scores of all.
  assert program.temp_bytes < 2 * scores
  assert 'mma.sync' in program.ptx
  assert wide_copies(program.ptx)


def test_scoring_casts_no_keys_of_a_memory():
  """Nor sorts them by rank: both would write more than scoring reads."""
  num_keys, width = 4096, 128

  def best(query, keys):
    row, column = key_scores.by_one_product(query, keys)
    return (row.sum(-1) + column.sum(-1)).max(-1)

  program = targets.compile_for(
    'h100',
    best,
    SHAPE((4, 2, 2, width), jnp.float32),
    SHAPE((2, 2, num_keys, width, 2), BF16),
  )
  scores = 4 * 2 * 2 * num_keys * 4
  assert program.temp_bytes < 8 * scores
  # A cast of all keys, or of those of one axis, would be one of these.
  assert 8 * scores < 4 * 2 * num_keys * width * 2
