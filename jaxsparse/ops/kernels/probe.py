# SPDX-License-Identifier: Apache-2.0
"""Whether a kernel runs here, which only compiling it tells."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxsparse import mesh


def unsupported_reason(
  function: Callable, *arguments: Any, **options: Any
) -> str | None:
  """What keeps a GPU's kernel from serving such arrays here, in words.

  Args:
    function: that runs the kernel.
    arguments: trees of arrays, of which shapes and types count.
    options: of the function, which can be hashed.
  """
  platform = mesh.platform()
  if platform != 'gpu':
    return f'it is for GPU, and this is {platform}'
  run = functools.partial(function, **options)
  try:
    # Under the mesh axes of the caller, which Pallas may not know.
    jax.eval_shape(run, *arguments)
  except Exception as error:
    return _in_words(error)
  leaves, tree = jax.tree.flatten(arguments)
  shapes = tuple((x.shape, x.dtype) for x in leaves)
  return _compilation_error(function, tuple(options.items()), tree, shapes)


def first_error(function: Callable, *arguments: Any) -> str | None:
  """The first line of the error that compiling for one device raises, or
  None."""
  try:
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
      jax.jit(function).lower(*arguments).compile()
  except Exception as error:
    return _in_words(error)
  return None


@functools.cache
def _compilation_error(
  function: Callable,
  options: tuple[tuple[str, Any], ...],
  tree: jax.tree_util.PyTreeDef,
  shapes: tuple,
):
  leaves = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
  run = functools.partial(function, **dict(options))
  return first_error(run, *jax.tree.unflatten(tree, leaves))


def _in_words(error: Exception) -> str:
  return f'{type(error).__name__}: {error}'.split('\n')[0]
