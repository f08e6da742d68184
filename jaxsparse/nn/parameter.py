# SPDX-License-Identifier: Apache-2.0
"""Parameters that may be quantized or adapted, as a module asks for them.

Such a one stands in its array's place in the tree. Linen compares the shapes of
a parameter's arrays with those that it would draw, and would refuse it.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsparse import mesh
from jaxsparse.ops.adapted_matrix import AdaptedMatrix
from jaxsparse.ops.memory.folded_keys import FoldedKeys
from jaxsparse.ops.quantized_matrix import QuantizedMatrix
from jaxsparse.ops.tables.host_table import HostTable
from jaxsparse.ops.tables.quantized_table import QuantizedTable
from jaxsparse.ops.tables.row_delta import DeltaTable

# An array, a `QuantizedMatrix`, an `AdaptedMatrix`, `FoldedKeys`, a
# `QuantizedTable`, a `HostTable` or a `DeltaTable`. Which may be in an array's
# place follows from its name, which types do not know.
Parameter = Any


def parameter(
  module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]
) -> Parameter:
  """`module.param`, and what is quantized or lies elsewhere as it is.

  An adapter that drops inputs gets a key, where the call has some for dropout.

  Raises:
    ScopeParamShapeError: of Flax, it has another shape.
  """
  if module.has_variable('params', name):
    value = module.get_variable('params', name)
    if is_quantized(value) or isinstance(
      value, AdaptedMatrix | FoldedKeys | HostTable | DeltaTable
    ):
      if value.shape != tuple(shape):
        path = '/'.join(module.path)
        raise flax.errors.ScopeParamShapeError(name, path, value.shape, shape)
      drops = isinstance(value, AdaptedMatrix) and value.dropout > 0
      if drops and module.has_rng('dropout'):
        value = dataclasses.replace(value, key=module.make_rng('dropout'))
      return value
  return module.param(name, init, shape)


def is_quantized(value: object) -> bool:
  return isinstance(value, QuantizedMatrix | QuantizedTable)


def gathered(
  value: jax.Array | QuantizedMatrix | AdaptedMatrix,
  dims: str,
  dtype: jax.typing.DTypeLike | None = None,
) -> Any:
  """A parameter as it takes part in a computation, see `mesh.gather`.

  Args:
    value: of dimensions with the letters `dims`.
    dims: likewise.
    dtype: of the result; None leaves that of the numbers.
  """
  if isinstance(value, AdaptedMatrix):
    return value.gathered(dims, gathered(value.base, dims, dtype), dtype)
  if isinstance(value, QuantizedMatrix):
    dtype = jnp.float32 if dtype is None else dtype
    return value.gathered(dims).dequantized(dtype, mesh.gathered(dims))
  value = mesh.gather(value, dims)
  # An array of NumPy's has no `at`, by which rows are read.
  return value if dtype is None else jnp.asarray(value).astype(dtype)


def stored(
  value: jax.Array | QuantizedMatrix | AdaptedMatrix, dims: str
) -> Parameter:
  """A parameter gathered, its numbers as they are stored."""
  if isinstance(value, AdaptedMatrix):
    return value.gathered(dims, stored(value.base, dims))
  if isinstance(value, QuantizedMatrix):
    return value.gathered(dims)
  return mesh.gather(value, dims)
