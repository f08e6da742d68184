# SPDX-License-Identifier: Apache-2.0
"""Optimizer states as earlier versions or starts of a run saved them.

Up to version 0.1 a run with a row optimizer had a state of two parts: 'rest',
of an optimizer for all parameters but value tables, and 'tables', of the row
optimizer, by each table's place. Today both are groups of one state.

Later versions had moments of all parameters, whatever `optimizer.trained` left
alone; today it is those of the trained ones. A run may also go on with another
part of its parameters: what is trained anew then begins with fresh moments.
"""

import dataclasses
from collections.abc import Callable

import jax
import optax

from jaxsparse import mesh
from jaxsparse.config import Config, saved_config
from jaxsparse.config.errors import require
from jaxsparse.training import optimizer as optimizer_lib
from jaxsparse.training import trained_part
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


def of_other_parts(
  config: Config, params: dict, record: dict
) -> list[optax.OptState]:
  """Abstract states of other parts of the parameters than the trained one.

  Args:
    config: of this start.
    params: abstract, all that a checkpoint has.
    record: of the newest checkpoint, empty without one.
  """
  known = {''}
  if 'config' in record:
    known.add(saved_config.from_json(record['config']).optimizer.trained)
  found = []
  for trained in sorted(known - {config.optimizer.trained}):
    optimizer = dataclasses.replace(config.optimizer, trained=trained)
    part, _ = trained_part.split(optimizer, params)
    init, own = optimizer_of(config).init, jax.sharding.get_mesh()
    found.append(mesh.abstract(init, part, mesh=own))
  return found


def converted(
  opt_state: optax.OptState,
  former: dict | None,
  abstract: optax.OptState,
  begin: Callable[[], optax.OptState],
  is_by_rows: bool,
) -> optax.OptState:
  """A restored state in today's layout, of the part that is trained.

  Args:
    opt_state: in that layout or in another.
    former: what `layout` returns.
    abstract: today's layout.
    begin: makes the state of a run that begins.
    is_by_rows: whether tables have a row optimizer.

  Raises:
    UserError: other tables are trained than so far, by rows.
  """
  structure = jax.tree.structure(opt_state)
  if structure == jax.tree.structure(abstract):
    return opt_state
  found = {_name(p): x for p, x in jax.tree.leaves_with_path(opt_state)}
  if structure == jax.tree.structure(former):

    def old_name(name: str) -> str:
      is_of_tables = name.startswith(_NOW)
      return f'tables/{name[len(_NOW) :]}' if is_of_tables else f'rest/{name}'

    return jax.tree.map_with_path(
      lambda path, _: found[old_name(_name(path))], abstract
    )
  names = {_name(path) for path, _ in jax.tree.leaves_with_path(abstract)}
  changed = sorted(n for n in names ^ found.keys() if n.startswith(_NOW))
  require(
    not (changed and is_by_rows),
    'optimizer.trained must leave the same tables alone as before where they '
    f'have a row optimizer, whose rows may wait for missed steps (it has, or '
    f'lacks, {"".join(changed[:1])!r}): begin a new run by train.start_from.',
  )
  fresh = begin() if names - found.keys() else abstract
  return jax.tree.map_with_path(
    lambda path, x: found.get(_name(path), x), fresh
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
