# SPDX-License-Identifier: Apache-2.0
"""Other forms of `grouped_matmul`, and whether they run here.

`lax.ragged_dot`, and Megablox for TPU: both want matrices of the rows' type.
And for GPUs our own kernel, see `ops.kernels.grouped_matmul`.
"""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.ops import chunking
from jaxsparse.ops.kernels import grouped_matmul as kernel
from jaxsparse.ops.shard_map_vma import match_vma

# Megablox cuts all three dimensions in tiles of this size.
_MEGABLOX_TILE = 128


def ragged_dot(
  rows: Float[Array, 'A _'],
  experts: Float[Array, 'X D F'],
  sizes: Int[Array, 'X'],
  is_transposed: bool = False,
):
  dtype = chunking.accumulator(rows)
  in_use = _in_use(rows, sizes)
  dims = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2 if is_transposed else 1,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[0],
  )
  out = jax.lax.ragged_dot_general(
    jnp.where(in_use, rows, 0),
    experts.astype(rows.dtype),
    sizes,
    dims,
    preferred_element_type=dtype,
  )
  return jnp.where(in_use, out, 0).astype(rows.dtype)


def megablox(
  rows: Float[Array, 'A D'],
  experts: Float[Array, 'X D F'],
  sizes: Int[Array, 'X'],
  interpret: bool = False,
):
  num_rows, in_use = len(rows), _in_use(rows, sizes)
  # Whole tiles of rows; what the kernel leaves unwritten is masked.
  padded = math.ceil(num_rows / _MEGABLOX_TILE) * _MEGABLOX_TILE
  out = _megablox_module().gmm(
    chunking.pad(jnp.where(in_use, rows, 0), padded, 0),
    experts.astype(rows.dtype),
    sizes,
    preferred_element_type=rows.dtype,
    tiling=(_MEGABLOX_TILE,) * 3,
    interpret=interpret,
  )
  return jnp.where(in_use, out[:num_rows], 0)


def _in_use(rows: Float[Array, 'A _'], sizes: Int[Array, 'X']):
  return jnp.arange(len(rows))[:, None] < sizes.sum()


def _megablox_module():
  return importlib.import_module('jax.experimental.pallas.ops.tpu.megablox.ops')


def triton(
  rows: Float[Array, 'A D'],
  experts: Float[Array, 'X D F'],
  sizes: Int[Array, 'X'],
  interpret: bool = False,
):
  return kernel.grouped_matmul(rows, experts, sizes, interpret)


def unsupported_reason(
  name: str, rows: jax.Array, experts: jax.Array
) -> str | None:
  """What keeps 'megablox' or 'triton' from running here, in words."""
  platform = dict(megablox='tpu', triton='gpu')[name]
  if mesh.platform() != platform:
    return f'it is for {platform.upper()}, and this is {mesh.platform()}'
  if name == 'triton' and (why := kernel.unsupported_reason(rows, experts)):
    return why
  try:
    sizes = jnp.zeros(len(experts), jnp.int32)
    # Under the mesh axes of the caller, which Pallas may not know.
    jax.eval_shape(_FUNCTIONS[name], *match_vma(rows, experts, sizes))
    _compile(name, rows.shape, rows.dtype, experts.shape, experts.dtype)
  except Exception as error:
    return f'{type(error).__name__}: {error}'.split('\n')[0]
  return None


_FUNCTIONS = dict(megablox=megablox, triton=triton)


@functools.cache
def _compile(
  name: str,
  rows_shape: tuple[int, ...],
  rows_dtype: jax.typing.DTypeLike,
  shape: tuple[int, ...],
  dtype: jax.typing.DTypeLike,
):
  # On one device, whatever mesh is set.
  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
    jax.jit(_FUNCTIONS[name]).lower(
      jax.ShapeDtypeStruct(rows_shape, rows_dtype),
      jax.ShapeDtypeStruct(shape, dtype),
      jax.ShapeDtypeStruct(shape[:1], jnp.int32),
    ).compile()
