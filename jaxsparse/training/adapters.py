# SPDX-License-Identifier: Apache-2.0
"""What a run trains beside a base that it never writes.

`init` draws it, `join` gives the parameters that the model takes, `describe`
says how many there are.
"""

import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from jaxsparse import mesh
from jaxsparse.analysis import cost
from jaxsparse.config import AdapterConfig, Config
from jaxsparse.nn import adapters, row_deltas
from jaxsparse.nn.adapters import Path
from jaxsparse.ops.quantized_matrix import QuantizedMatrix
from jaxsparse.training import trained_part


def init(config: Config, base: Any) -> dict:
  """The adapter before the first step, of the function of the base; jit it.

  Random numbers depend neither on the mesh nor on what else is adapted.

  Args:
    config: of the run.
    base: its parameters, on the mesh in use; for rows what
      `trained_rows.settled` made of them.

  Raises:
    UserError: adapter.targets finds nothing, or what can have no adapter.
  """
  if config.adapter.kind == 'rows':
    return row_deltas.zeros(base)
  key = jax.random.key(config.train.seed)
  found = {}
  for path, x in adapters.targets(config.adapter, base).items():
    place = zlib.crc32('/'.join(path).encode())
    found[path] = _draw(config.adapter, path, x, jax.random.fold_in(key, place))
  return unflatten_dict(found)


def _draw(config: AdapterConfig, path: Path, x: Any, key: jax.Array) -> dict:
  """A is uniform within 1 / sqrt(fan in), as peft draws it; B is 0."""
  matrix = adapters.adapted(config, path, x, a=None, b=None)
  shapes = matrix.of_dims(x.shape, config.rank, 1)
  specs = matrix.of_dims(_spec(x), None, None)
  fan_in = math.prod(x.shape[i] for i in matrix.contracted)
  bound = fan_in**-0.5

  def uniform(key, shape):
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

  def drawn(name, init):
    spec = None if mesh.axis_sizes() is None else jax.P(*specs[name])
    return mesh.sharded(init, spec)(key, tuple(shapes[name]))

  arrays = dict(
    a=drawn('a', uniform), b=drawn('b', lambda _, shape: jnp.zeros(shape))
  )
  if config.use_dora:
    arrays['magnitude'] = adapters.adapted(config, path, x, **arrays).norm()
  return arrays


def _spec(x: Any) -> list:
  """Mesh axes of each dimension."""
  split = x.entries if isinstance(x, QuantizedMatrix) else mesh.entries(x)
  return [names or None for names in split]


def join(config: Config, frozen: dict, trained: dict) -> dict:
  """The parameters that the model takes: of a run with an adapter the base and
  what is trained beside it, of another both of its parts.
  """
  if not config.adapter.kind:
    return trained_part.joined(frozen, trained)
  if config.adapter.kind == 'rows':
    return row_deltas.with_values(frozen, trained)
  return adapters.joined(config.adapter, frozen, trained)


def saved(config: Config, frozen: dict, trained: dict) -> dict:
  """What a checkpoint holds: of an adapter's run no base, of rows which."""
  if not config.adapter.kind:
    return trained_part.joined(frozen, trained)
  if config.adapter.kind == 'rows':
    return row_deltas.kept(frozen, trained)
  return trained


# For what takes arrays alone, such as the sample at the end.
merged = adapters.merged


def parts(config: Config, base: dict | None, found: dict) -> tuple[dict, dict]:
  """What is trained and what is not, of what `saved` saved.

  Args:
    config: of the run.
    base: what an adapter stands beside, if one is trained.
    found: in the checkpoint.

  Raises:
    UserError: other rows were trained.
  """
  if base is None:
    return trained_part.split(config.optimizer, found)
  if config.adapter.kind == 'rows':
    return row_deltas.restored_values(base, found), base
  return found, base


def describe(config: Config, base: Any) -> str:
  """A sentence: how many parameters are trained, of dense ones and of all."""
  of = cost.count_parameters(config.model)
  if config.adapter.kind == 'rows':
    values = jax.tree.leaves(jax.eval_shape(row_deltas.zeros, base))
    count = sum(x.size for x in values)
    rows = sum(x.shape[0] for x in values)
    return (
      f'{count:,} parameters are trained, in {rows:,} rows of tables: '
      f'{count / of.values:.2%} of the {of.values / 1e6:.2f}M values, '
      f'{count / of.total:.2%} of all {of.total / 1e6:.2f}M.'
    )
  count = adapters.num_parameters(config.adapter, base)
  num = len(adapters.targets(config.adapter, base))
  dense = of.dense + of.memory + of.experts
  ones = 'dense ones and experts' if of.experts else 'dense ones'
  return (
    f'{count:,} parameters are trained, in adapters of {num} matrices: '
    f'{count / dense:.2%} of the {dense / 1e6:.2f}M {ones}, '
    f'{count / of.total:.2%} of all {of.total / 1e6:.2f}M.'
  )
