"""Libraries' forms of `grouped_matmul`: `lax.ragged_dot`, and Megablox for TPU.

Both want rows sorted by expert and matrices of the rows' type.
"""

import functools
import importlib
import math

import jax
import jax.numpy as jnp

from jaxsparse.ops import bag_pieces
from jaxsparse.ops.varying import to_same_varying

# Megablox cuts all three dimensions in tiles of this size.
_MEGABLOX_TILE = 128


def ragged_dot(rows, experts, sizes):
  dtype = bag_pieces.accumulator(rows)
  in_use = _in_use(rows, sizes)
  out = jax.lax.ragged_dot(
    jnp.where(in_use, rows, 0),
    experts.astype(rows.dtype),
    sizes,
    preferred_element_type=dtype,
  )
  return jnp.where(in_use, out, 0).astype(rows.dtype)


def megablox(rows, experts, sizes, interpret=False):
  num_rows, in_use = len(rows), _in_use(rows, sizes)
  # Whole tiles of rows; what the kernel leaves unwritten is masked.
  padded = math.ceil(num_rows / _MEGABLOX_TILE) * _MEGABLOX_TILE
  out = _megablox_module().gmm(
    bag_pieces.pad(jnp.where(in_use, rows, 0), padded, 0),
    experts.astype(rows.dtype),
    sizes,
    preferred_element_type=rows.dtype,
    tiling=(_MEGABLOX_TILE,) * 3,
    interpret=interpret,
  )
  return jnp.where(in_use, out[:num_rows], 0)


def _in_use(rows, sizes):
  return jnp.arange(len(rows))[:, None] < sizes.sum()


def _megablox_module():
  return importlib.import_module('jax.experimental.pallas.ops.tpu.megablox.ops')


def why_not_megablox(rows, experts) -> str | None:
  """What keeps megablox from running on these arrays, in words."""
  if jax.default_backend() != 'tpu':
    return f'it is for TPU, and this is {jax.default_backend()}'
  try:
    sizes = jnp.zeros(len(experts), jnp.int32)
    # Under the mesh axes of the caller, which Pallas may not know.
    jax.eval_shape(megablox, *to_same_varying(rows, experts, sizes))
    _compile_megablox(rows.shape, rows.dtype, experts.shape, experts.dtype)
  except Exception as error:
    return f'{type(error).__name__}: {error}'.split('\n')[0]
  return None


@functools.cache
def _compile_megablox(rows_shape, rows_dtype, shape, dtype):
  jax.jit(megablox).lower(
    jax.ShapeDtypeStruct(rows_shape, rows_dtype),
    jax.ShapeDtypeStruct(shape, dtype),
    jax.ShapeDtypeStruct(shape[:1], jnp.int32),
  ).compile()
