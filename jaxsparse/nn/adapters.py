# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters beside the parameters of a model.

An adapter is a tree of its own: of each matrix that has one 'a' and 'b', and
'magnitude' for DoRA, in the place of the matrix in nested dicts. `joined` puts
it beside the matrices, and the model takes what comes out as its parameters.
"""

import dataclasses
import re
from typing import Any

import jax

from jaxsparse.config import AdapterConfig
from jaxsparse.config.errors import UserError, require
from jaxsparse.nn.matrices import (
  CONTRACTED,
  EXPERTS,
  LOOKED_UP,
  VOCABULARY,
  place_of,
)
from jaxsparse.ops.adapted_matrix import AdaptedMatrix
from jaxsparse.ops.quantized_matrix import QuantizedMatrix

Path = tuple[str, ...]

# The arrays of a matrix's adapter.
ARRAYS = ('a', 'b', 'magnitude')


def leaves(params: Any, prefix: Path = ()) -> dict[Path, Any]:
  """Arrays, or what stands for one, by their paths."""
  found: dict[Path, Any] = {}
  for name, value in params.items():
    path = (*prefix, name)
    if isinstance(value, dict):
      found |= leaves(value, path)
    else:
      found[path] = value
  return found


def at(params: Any, path: Path) -> Any:
  """What is at a path; None if nothing is."""
  for name in path:
    params = params.get(name) if isinstance(params, dict) else None
  return params


def targets(config: AdapterConfig, params: Any) -> dict[Path, Any]:
  """The matrices that get an adapter, by their paths.

  Args:
    config: of the adapter.
    params: of the base; shapes will do.

  Raises:
    UserError: `config.targets` finds none, or a leaf that can have none.
  """
  all_leaves = leaves(params)
  able = [p for p in all_leaves if contracted(p)]
  found = {
    path: x
    for path, x in all_leaves.items()
    if re.search(config.targets, '/'.join(path))
  }
  example = '/'.join(able[0]) if able else 'none'
  require(
    bool(found),
    f'adapter.targets must find a matrix, such as {example!r}, got '
    f'{config.targets!r}.',
  )
  for path in found:
    _require_able(config, path, example)
  return found


def contracted(path: Path) -> tuple[int, ...]:
  """Dimensions of a leaf that a product sums over; () for one without."""
  place = place_of(path)
  if place == LOOKED_UP:
    return ()
  return CONTRACTED.get(place) or VOCABULARY.get(place) or ()


def _require_able(config: AdapterConfig, path: Path, example: str) -> None:
  name = '/'.join(path)
  require(
    place_of(path) != LOOKED_UP,
    f'adapter.targets = {config.targets!r} finds {name!r}, whose rows are '
    'looked up, which has no low-rank adapter: train it by optimizer.trained.',
  )
  require(
    bool(contracted(path)),
    f'adapter.targets = {config.targets!r} finds {name!r}, which is no matrix '
    f'that tokens are multiplied with, as {example!r} is: leave it out.',
  )
  is_of_experts = place_of(path) in EXPERTS
  for field, off in (('dropout', 0), ('use_dora', False)):
    require(
      not (is_of_experts and getattr(config, field)),
      f'adapter.{field} must be {off} with matrices of experts, and '
      f'adapter.targets = {config.targets!r} finds {name!r}.',
    )


def adapted(config: AdapterConfig, path: Path, base: Any, **arrays: Any) -> Any:
  """A matrix with its adapter.

  Args:
    config: of the adapter.
    path: of the matrix.
    base: the matrix.
    **arrays: `a`, `b` and for DoRA `magnitude`.
  """
  return AdaptedMatrix(
    base,
    **arrays,
    scale=config.scale,
    contracted=contracted(path),
    num_experts=int(place_of(path) in EXPERTS),
    dropout=config.dropout,
  )


def joined(config: AdapterConfig, params: dict, adapter: dict) -> dict:
  """The parameters with the adapter beside its matrices.

  Args:
    config: of the adapter.
    params: of the base, which stay as they are.
    adapter: nested dicts.
  """
  return _joined(config, params, adapter, ())


def _joined(config, params, adapter, prefix):
  if not isinstance(params, dict):
    return adapted(config, prefix, params, **adapter)
  return params | {
    name: _joined(config, params[name], of, (*prefix, name))
    for name, of in adapter.items()
  }


def merged(params: Any) -> Any:
  """The parameters with adapters in their matrices, where these are floats.

  Beside a quantized matrix an adapter stays, and in training too it would
  have.
  """

  def on_leaf(x: Any) -> Any:
    if not isinstance(x, AdaptedMatrix):
      return x
    if isinstance(x.base, QuantizedMatrix):
      return dataclasses.replace(x, dropout=0.0)
    return _merge(x)

  return jax.tree.map(
    on_leaf, params, is_leaf=lambda x: isinstance(x, AdaptedMatrix)
  )


_merge = jax.jit(AdaptedMatrix.merged)


def check(config: AdapterConfig, params: Any, adapter: Any, where: str) -> None:
  """Compares an adapter with the base that it is to stand beside.

  Args:
    config: of the adapter.
    params: of the base; shapes will do.
    adapter: nested dicts.
    where: the adapter is from, for the sentence.

  Raises:
    UserError: a leaf is unknown or missing, or of another shape or rank.
  """
  of_base, found = leaves(params), leaves(adapter)
  names = {path[:-1] for path in found}
  for path in sorted(names):
    name = '/'.join(path)
    if path not in of_base or not contracted(path):
      raise UserError(
        f'the adapter in {where!r} has {name!r}, which is no matrix of this '
        'model: give the model that it was trained beside.'
      )
    matrix = adapted(config, path, of_base[path], a=None, b=None)
    sizes = matrix.of_dims(of_base[path].shape, config.rank, 1)
    if not config.use_dora:
      del sizes['magnitude']
    for part, shape in sizes.items():
      array = found.pop((*path, part), None)
      require(
        array is not None and tuple(array.shape) == tuple(shape),
        f'{name}/{part} of the adapter in {where!r} must have the shape '
        f'{list(shape)}, of rank {config.rank}, but '
        + (f'has {list(array.shape)}.' if array is not None else 'is missing.'),
      )
  extra = sorted('/'.join(path) for path in found)
  require(
    not extra,
    f'the adapter in {where!r} has {"".join(extra[:1])!r}, which no adapter '
    'of its settings has.',
  )
  require(bool(names), f'the adapter in {where!r} holds nothing.')


def num_parameters(config: AdapterConfig, params: Any) -> int:
  """Numbers that the adapter trains."""
  total = 0
  for path, x in targets(config, params).items():
    sizes = adapted(config, path, x, a=None, b=None).of_dims(
      x.shape, config.rank, 1
    )
    if not config.use_dora:
      del sizes['magnitude']
    for shape in sizes.values():
      size = 1
      for n in shape:
        size *= n
      total += size
  return total
