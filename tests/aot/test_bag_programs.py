# SPDX-License-Identifier: Apache-2.0
"""What a GPU and a TPU execute for a value bag and its gradients.

Run with `pytest -m aot`, extra `aot`; see `targets` for what this can prove.
"""

import math
import re

import jax
import jax.numpy as jnp
import ptx
import pytest
import targets

from jaxsparse.ops import chunking
from jaxsparse.ops.memory.usage import count_uses
from jaxsparse.ops.memory.value_bag import value_bag, value_bag_reference

pytestmark = pytest.mark.aot

# Rows, width, tokens, entries per token. On TPU the table exceeds the 128 MiB
# of fast memory, where the compiler would keep a smaller one.
M, W, T, k = 2**18, 256, 4096, 32

VARIANTS = dict(
  f32=dict(dtype=jnp.float32),
  bf16=dict(dtype=jnp.bfloat16),
  f32_pools=dict(dtype=jnp.float32, num_cores=2, num_pools=4),
  bf16_pools=dict(dtype=jnp.bfloat16, num_cores=2, num_pools=4),
)
variants = pytest.mark.parametrize('variant', VARIANTS)
tpus = pytest.mark.parametrize('tpu', ['v5e', 'v6e'])


def _arguments(dtype, num_cores=1, num_pools=None, T=T, k=k, W=W):
  shape = jax.ShapeDtypeStruct
  return (
    shape((M, W), dtype),
    shape((T, k), jnp.int32),
    shape((T, k, num_cores), jnp.float32),
    shape((T, k), jnp.int32) if num_pools else None,
  )


def _forward(variant, function=value_bag, **sizes):
  num_pools = VARIANTS[variant].get('num_pools', 1)

  def forward(table, slot, weight, pool):
    return function(table, slot, weight, pool, num_pools)

  return forward, _arguments(**VARIANTS[variant], **sizes)


def _backward(variant, wanted, **options):
  """The gradient of the table (0) or of the weights (1) alone."""
  arguments = _arguments(**VARIANTS[variant])
  num_pools = VARIANTS[variant].get('num_pools', 1)
  cotangent = jax.ShapeDtypeStruct((T, num_pools, W), jnp.float32)

  def backward(table, slot, weight, pool, cotangent):
    _, vjp = jax.vjp(
      lambda t, w: value_bag(t, slot, w, pool, num_pools, **options),
      table,
      weight,
    )
    return vjp(cotangent)[wanted]

  return backward, (*arguments, cotangent)


def _num_kernels(program):
  return len(re.findall(r' (?:fusion|custom-call|copy|sort)\(', program.text))


@variants
def test_gpu_forward_of_few_tokens_gathers_their_rows_once(variant):
  forward, arguments = _forward(variant, T=512)
  program = targets.compile_for('h100', forward, *arguments)
  # Rows in f32, and with pools their products by pool.
  assert program.temp_bytes <= 1.25 * 512 * k * W * 4


@pytest.mark.parametrize('sizes', [(16384, 32, 256), (32768, 84, 1024)])
@pytest.mark.parametrize('variant', ['f32', 'bf16', 'bf16_pools'])
def test_gpu_forward_of_many_tokens_repeats_it(variant, sizes):
  forward, arguments = _forward(variant, **dict(zip('TkW', sizes, strict=True)))
  program = targets.compile_for('h100', forward, *arguments)
  assert program.temp_bytes < 1024  # the loop's counter


@pytest.mark.parametrize(
  ('variant', 'width'), [('f32', 'b32'), ('bf16', 'b16')]
)
def test_gpu_forward_reads_vectors_of_four(variant, width, tmp_path):
  forward, arguments = _forward(variant)
  program = targets.compile_for('h100', forward, *arguments, dump=tmp_path)
  assert f'ld.global.nc.v4.{width}' in ptx.loads(program.ptx)


def test_the_obvious_form_would_write_all_rows_to_memory():
  forward, arguments = _forward('f32', value_bag_reference)
  program = targets.compile_for('h100', forward, *arguments)
  assert program.temp_bytes >= T * k * W * 4


@variants
@tpus
def test_tpu_forward_keeps_rows_in_fast_memory(variant, tpu):
  forward, arguments = _forward(variant)
  program = targets.compile_for(tpu, forward, *arguments)
  # At most a chunk's: the library of JAX 0.12 keeps a v6e's in main memory.
  assert program.temp_bytes <= 1.1 * chunking.CHUNK_BYTES
  assert _largest_but(program.text, M * W) < T * k * W


@variants
def test_gpu_weight_gradient_is_one_kernel_without_temporaries(variant):
  backward, arguments = _backward(variant, 1)
  program = targets.compile_for('h100', backward, *arguments)
  assert program.temp_bytes == 0
  assert _num_kernels(program) == 1


@variants
def test_gpu_table_gradient_adds_vectors_of_f32_in_place(variant, tmp_path):
  backward, arguments = _backward(variant, 0)
  program = targets.compile_for('h100', backward, *arguments, dump=tmp_path)
  atomics = ptx.atomics(program.ptx)
  assert atomics == {'atom.global.v4.f32.add'}
  is_narrow = VARIANTS[variant]['dtype'] == jnp.bfloat16
  # A bf16 table's gradient is added up in f32.
  assert program.temp_bytes == (M * W * 4 if is_narrow else 0)


def test_gpu_sorted_table_gradient_keeps_no_rows(tmp_path):
  backward, arguments = _backward('f32', 0, table_gradient='sorted')
  program = targets.compile_for('h100', backward, *arguments, dump=tmp_path)
  assert ptx.atomics(program.ptx) == {'atom.global.v4.f32.add'}
  assert program.temp_bytes < T * k * 4 * 8


def test_gpu_deterministic_table_gradient_has_no_atomics(tmp_path):
  backward, arguments = _backward('f32', 0, table_gradient='deterministic')
  program = targets.compile_for('h100', backward, *arguments, dump=tmp_path)
  assert ptx.atomics(program.ptx) == set()
  assert program.temp_bytes < T * k * W * 4


@pytest.mark.parametrize('variant', ['f32', 'f32_pools'])
def test_tpu_gradients_keep_no_rows(variant):
  for wanted in (0, 1):
    backward, arguments = _backward(variant, wanted)
    program = targets.compile_for('v5e', backward, *arguments)
    assert program.temp_bytes < 2**25
    assert _largest_but(program.text, M * W) < T * k * W


def test_gpu_hits_are_counted_by_integer_atomics(tmp_path):
  slot = jax.ShapeDtypeStruct((T, k), jnp.int32)
  program = targets.compile_for(
    'h100', lambda slot: count_uses(slot, M), slot, dump=tmp_path
  )
  (atomic,) = ptx.atomics(program.ptx)
  assert '.add.' in atomic
  assert atomic.endswith(('.u32', '.s32'))


def _largest_but(text, table_size):
  """Elements of the largest array, tables left out."""
  sizes = {
    math.prod(map(int, dims.split(',')))
    for dims in re.findall(r'\b[a-z]+\d+\[([\d,]+)\]', text)
  }
  return max(sizes - {table_size})
