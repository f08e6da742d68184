# SPDX-License-Identifier: Apache-2.0
"""Gradients of any Flax model in which tables are `RowGradient`s.

Tables are found by what memory layers sow, and not by where they stand: a layer
may have any name, stand in any module, and be called again.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxsparse.config.errors import UserError, require
from jaxsparse.nn.memory.tables import ENTRIES, PROBES, TABLE_OF
from jaxsparse.ops.memory.table_reads import TableReads, gradient_of_reads

Params = Mapping[str, Any]


def row_value_and_grad(
  loss: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, dict]]:
  """`jax.value_and_grad` whose gradients of tables cost what was read of them.

    def loss(apply, params, batch):
      y, metrics = apply(model, params, batch['x'])
      return jnp.mean((y - batch['y']) ** 2) + metrics['aux_loss']

    value, gradients = row_value_and_grad(loss)(params, batch)

  Args:
    loss: of `apply`, the parameters and more. `apply(module, params, ...)`
      stands for `module.apply({'params': params}, ...)`, of which it takes the
      other arguments as well; its `params` are those of `loss`, or a part.
    has_aux: whether `loss` returns a pair, and only its first is the loss.

  Returns:
    A function of `params` and more that returns the value of the loss, or the
    pair, and gradients like `params`, where each table that memory layers have
    read is a `RowGradient`. Jit it; the step as well, its arguments donated.
    `row_adam` and `row_adagrad` take them, beside others by `optax.partition`;
    `apply_updates` adds the updates.

  Raises:
    UserError: it can't be said which leaf of `params` is the table of a layer.
  """

  def run(params: Params, *args: Any) -> tuple[Any, dict]:
    def probes_of(params, *args):
      first = _Apply(params)
      loss(first, params, *args)
      return first.probes

    shapes = jax.eval_shape(probes_of, params, *args)
    places: list[_Place] = []

    def passed(params, probes):
      second = _Apply(params, probes)
      result = loss(second, params, *args)
      places.extend(second.places)
      value, aux = result if has_aux else (result, None)
      return value, (aux, second.reads)

    (value, (aux, reads)), (gradients, of_probes) = jax.value_and_grad(
      passed, (0, 1), has_aux=True
    )(params, jax.tree.map(_zeros, shapes))
    by_table: dict[tuple, list] = {}
    for place, read in zip(places, reads, strict=True):
      pair = read, _at(of_probes[place.call], place.probe)
      by_table.setdefault(place.table, []).append(pair)
    for table, pairs in by_table.items():
      gradient = gradient_of_reads(*map(list, zip(*pairs, strict=True)))
      gradients = _replaced(gradients, table, gradient)
    return ((value, aux) if has_aux else value), gradients

  return run


class _Place(NamedTuple):
  """Where a read table and the probe of the reading stand."""

  table: tuple[str, ...]
  # Number of the call of `apply`, and path in its probes.
  call: int
  probe: tuple[str, ...]


class _Apply:
  """What `loss` gets in place of `module.apply`."""

  def __init__(self, params: Params, given: list | None = None):
    self._paths = {
      id(leaf): tuple(part.key for part in path)
      for path, leaf in jax.tree.leaves_with_path(params)
    }
    self._given = given
    # Of each call of `apply`.
    self.probes: list = []
    self.reads: list[TableReads] = []
    self.places: list[_Place] = []

  def __call__(
    self, module: nn.Module, params: Params, *args: Any, **kwargs: Any
  ) -> Any:
    mutable = kwargs.pop('mutable', False)
    asked = [mutable] if isinstance(mutable, str) else list(mutable or ())
    variables, own = dict(params=params), [ENTRIES, PROBES]
    if self._given is not None:
      variables[PROBES], own = self._given[len(self.probes)], [ENTRIES]
    result, changed = module.apply(
      variables, *args, mutable=asked + own, **kwargs
    )
    self._keep(params, changed.pop(ENTRIES, {}), ())
    self.probes.append(changed.pop(PROBES, {}))
    return (result, changed) if mutable else result

  def _keep(self, params: Params, sown: Mapping, path: tuple) -> None:
    for name, below in sown.items():
      if isinstance(below, Mapping):
        self._keep(params, below, (*path, name))
        continue
      table = _find_table(params, path, TABLE_OF[name])
      require(
        id(table) in self._paths,
        'apply must get the params of loss, or a part of them: the '
        f'{TABLE_OF[name]} of {"/".join(path) or "the layer"} is none of its.',
      )
      for i, reads in enumerate(below):
        probe = (*path, f'{name}_{i}' if i else name)
        self.reads.append(reads)
        self.places.append(
          _Place(self._paths[id(table)], len(self.probes), probe)
        )


def _zeros(shape: jax.ShapeDtypeStruct) -> jax.Array:
  where = {} if shape.sharding is None else dict(device=shape.sharding)
  return jnp.zeros(shape.shape, shape.dtype, **where)


def _find_table(params: Any, path: tuple, name: str) -> jax.Array:
  """The table of a layer: its own, or the only one in a module beside it.

  Or in one beside those around it, the nearest first.

  Raises:
    UserError: several tables may be meant, or there is none.
  """
  around = [params]
  for part in path:
    around.append(around[-1].get(part, {}))
  if name in around[-1]:
    return around[-1][name]
  for modules in reversed(around[:-1]):
    holders = [
      below[name]
      for below in modules.values()
      if isinstance(below, Mapping) and name in below
    ]
    require(
      len(holders) < 2,
      f'{name} of {"/".join(path)} must be the only one in the modules beside '
      f'it, got {len(holders)}.',
    )
    if holders:
      return holders[0]
  raise UserError(f'{name} of {"/".join(path)} must be among the parameters.')


def _at(tree: Any, path: tuple) -> Any:
  return functools.reduce(operator.getitem, path, tree)


def _replaced(tree: Any, path: tuple, value: Any) -> Any:
  if not path:
    return value
  name, *rest = path
  return {**tree, name: _replaced(tree[name], tuple(rest), value)}
