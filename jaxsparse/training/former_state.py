# SPDX-License-Identifier: Apache-2.0
"""Optimizer states as earlier versions saved them.

Up to version 0.1 a run with a row optimizer had a state of two parts: 'rest',
of an optimizer for all parameters but value tables, and 'tables', of the row
optimizer, by each table's place. Today both are groups of one state.
"""

import dataclasses

import jax
import optax

from jaxsparse import mesh
from jaxsparse.config import Config
from jaxsparse.training import optimizer as optimizer_lib
from jaxsparse.training.step import optimizer_of

_NOW = f'inner_states/{optimizer_lib.VALUES}/inner_state/'


def layout(config: Config, params: dict) -> dict | None:
  """The abstract state of two parts; None if the config never had one.

  Args:
    config: of the run.
    params: abstract parameters on the mesh in use.
  """
  if not optimizer_lib.is_by_rows(config.optimizer):
    return None
  dense = dataclasses.replace(
    config.optimizer, value_optimizer='adamw', value_row_budget=0
  )

  def init(params):
    rest, tables = _split(params)
    rows = optimizer_lib.make_row_optimizer(
      config.optimizer, config.train.num_steps
    )
    rest_optimizer = optimizer_of(dataclasses.replace(config, optimizer=dense))
    return {'rest': rest_optimizer.init(rest), 'tables': rows.init(tables)}

  return mesh.abstract(init, params, mesh=jax.sharding.get_mesh())


def converted(
  opt_state: optax.OptState, former: dict | None, abstract: optax.OptState
) -> optax.OptState:
  """A restored state in today's layout.

  Args:
    opt_state: in that layout or in the former.
    former: what `layout` returns.
    abstract: today's layout.
  """
  if jax.tree.structure(opt_state) != jax.tree.structure(former):
    return opt_state
  found = {_name(p): x for p, x in jax.tree.leaves_with_path(opt_state)}

  def old_name(name: str) -> str:
    is_of_tables = name.startswith(_NOW)
    return f'tables/{name[len(_NOW) :]}' if is_of_tables else f'rest/{name}'

  return jax.tree.map_with_path(
    lambda path, _: found[old_name(_name(path))], abstract
  )


def _split(params: dict, prefix: str = '') -> tuple[dict, dict]:
  """Without the tables, and these by place: "block_01/memory/value_table"."""
  rest, tables = {}, {}
  groups = optimizer_lib.labels(params)
  for name, leaf in params.items():
    if isinstance(leaf, dict):
      rest[name], more = _split(leaf, f'{prefix}{name}/')
      tables |= more
    elif groups[name] == optimizer_lib.VALUES:
      tables[prefix + name] = leaf
    else:
      rest[name] = leaf
  return rest, tables


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')
