# SPDX-License-Identifier: Apache-2.0
"""The step of value tables whose gradient is kept row by row.

The gradient of a table never exists: a probe, zeros added to what a memory
layer has pooled, gets the pools' gradient, and with the entries that the layer
read this is the table's whole gradient. Every device then gathers what concerns
its part of the tables, sums it per row that was read, and changes those rows
and their optimizer state, in place.

Beside the forward and backward pass this sends the entries and the pools'
gradient once more, and, where copies of a table are kept along `data`, to all
of these, which take the same step.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse import mesh
from jaxsparse.config import Config, ModelConfig
from jaxsparse.nn.memory.tables import (
  ENTRIES,
  PROBES,
  TABLE_OF,
  table_scheme,
)
from jaxsparse.ops.memory.row_gradient import RowGradient
from jaxsparse.ops.memory.table_exchange import TableExchange
from jaxsparse.ops.memory.table_reads import RowWindows
from jaxsparse.training import loss_scale
from jaxsparse.training.optimizer import (
  VALUES,
  labels,
  make_row_optimizer,
)
from jaxsparse.training.optimizers import finalizing
from jaxsparse.training.optimizers.each_device import (
  is_row_gradient,
  on_each_device,
  specs_of,
)
from jaxsparse.training.optimizers.row_updates import (
  apply_updates,
  clip_scale,
  scaled,
  squared_norm,
)


def split_tables(params: optax.Params) -> tuple[optax.Params, optax.Params]:
  """The parameters without the tables of memory layers, and these.

  Both are trees like the parameters, as `finalizing.split` gives them;
  `finalizing.merged` undoes it.
  """
  tables, rest = finalizing.split(params, labels(params), VALUES)
  return rest, tables


def make_probes(config: ModelConfig, batch_size: int, length: int) -> dict:
  """Zeros to add to what memory layers read: a collection of variables."""
  memory = config.sized_memory
  shapes = dict(pooled=(memory.num_pools, memory.value_dim))
  if memory.pre_value_dim:
    shapes['products'] = (memory.num_heads * memory.num_selected,)
  probes = {}
  for name, shape in shapes.items():
    probe = jnp.zeros((batch_size, length, *shape), config.dtype)
    dims = 'BT.W' if name == 'pooled' else 'BT.'
    probes[name] = mesh.reshard(probe, mesh.act(dims))
  return {
    PROBES: {
      f'block_{read:02}': {'memory': probes} for read, _ in memory.placements
    }
  }


def table_gradients(
  config: ModelConfig, probes: dict, sown: dict
) -> dict[str, tuple]:
  """By table what makes up its gradient: rows, weights, pools, cotangents.

  Where layers share a table, their entries stand one after another along
  the positions.

  Args:
    config: of the model.
    probes: gradient of `make_probes`.
    sown: the collection of what the layers read.
  """
  found = {}
  for block, leaves in sown.get(ENTRIES, {}).items():
    for name, (reads,) in leaves['memory'].items():
      cotangent = probes[PROBES][block]['memory'][name]
      prefix = '' if config.memory.shared_rows else f'{block}/'
      table = f'{prefix}memory/{TABLE_OF[name]}'
      found.setdefault(table, []).append(reads.terms(cotangent))
  return {
    table: jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *gradients)
    for table, gradients in found.items()
  }


def update_tables(
  config: Config,
  tables: optax.Params,
  state: optax.OptState,
  gradients: dict[str, tuple],
  other_square: jax.Array,
  key: jax.Array | None,
  scale: loss_scale.LossScale | None = None,
) -> tuple[optax.Params, optax.OptState, jax.Array, dict[str, jax.Array]]:
  """One optimizer step on the rows that were read.

  Args:
    config: of the run.
    tables: what `split_tables` returns; like `state` changed in place where
      donated.
    state: of the row optimizer.
    gradients: what `table_gradients` returns.
    other_square: squared norm of the gradient of all other parameters.
    key: for stochastic rounding; None rounds to the nearest.
    scale: by which `gradients` are still multiplied; nothing is changed if they
      overflow it.

  Returns:
    Tables and state after the step, the norm of the gradient of all parameters
    before clipping, and 'value_rows_touched' and 'value_rows_over_budget', how
    many rows were read and how many of them took another pass; over all tables.
  """
  exchange = _exchange(config)
  is_fixed = config.model.memory.table.gradient == 'deterministic'
  budget = config.optimizer.value_row_budget

  def on_device(tables, state, gradients, other_square, key, scale):
    def windows_of(path, _):
      place = jax.tree_util.keystr(path, simple=True, separator='/')
      return RowWindows(exchange, *gradients[place], is_fixed, budget)

    windows = jax.tree.map_with_path(windows_of, tables)
    return _step(
      config, exchange, windows, tables, state, other_square, key, scale
    )

  rows = dict.fromkeys(_ROW_COUNTS, jax.P())
  specs = (*specs_of((tables, state)), jax.P(), rows)
  return on_each_device(on_device, specs)(
    tables, state, gradients, other_square, key, scale
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RestOfRows:
  """What `later_gradients` makes the gradients of rows beyond the budget of.

  Attributes:
    gradients: what `table_gradients` returns.
    clipping: what gradients are multiplied by.
    scale: by which `gradients` are still multiplied.
    num_passes: windows of all rows, the first among them.
  """

  gradients: dict[str, tuple]
  clipping: jax.Array
  scale: loss_scale.LossScale | None
  num_passes: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TableGradients:
  """The gradients of tables that lie elsewhere, clipped.

  Attributes:
    first: by table that of the rows within the budget. Where a mesh cuts the
      table's rows, the parts of its pieces stand one after another, each
      counted from its piece's first row.
    rest: for that of the others, if there may be any.
  """

  first: dict[str, RowGradient]
  rest: RestOfRows | None


def row_gradients(
  config: Config,
  gradients: dict[str, tuple],
  other_square: jax.Array,
  scale: loss_scale.LossScale | None = None,
) -> tuple[TableGradients, jax.Array, dict[str, jax.Array]]:
  """The gradients of tables that lie elsewhere, for `update_tables` to come.

  Args:
    config: of the run.
    gradients: what `table_gradients` returns.
    other_square: squared norm of the gradient of all other parameters.
    scale: by which `gradients` are still multiplied.

  Returns:
    The gradients of all rows that were read, and the norm and the counts that
    `update_tables` returns.
  """
  exchange = _exchange(config)

  def on_device(gradients, other_square, scale):
    windows = _windows_of(config, exchange, gradients)
    found, num_passes, square = _first_and_norm(windows, exchange, scale)
    norm = jnp.sqrt(other_square + exchange.total(square))
    clipping = clip_scale(norm, config.optimizer.clip_norm)
    if found is None:
      found = loss_scale.divided(_rows_of(windows, 0), scale)
    first = _pairs(scaled(found, clipping))
    counts = _counts(exchange, jax.tree.leaves(windows))
    return first, (clipping, num_passes), norm, counts

  pair = _specs_of_pair(exchange)
  counted = dict.fromkeys(_ROW_COUNTS, jax.P())
  specs = (dict.fromkeys(gradients, pair), (jax.P(), jax.P()), jax.P(), counted)
  first, (clipping, num_passes), norm, counts = on_each_device(
    on_device, specs
  )(gradients, other_square, scale)
  rest = None
  if not _is_one_pass(config, exchange, gradients):
    rest = RestOfRows(gradients, clipping, scale, num_passes)
  first = {path: RowGradient(*of) for path, of in first.items()}
  return TableGradients(first, rest), norm, counts


def later_gradients(
  config: Config, rest: RestOfRows, index: jax.Array
) -> dict[str, RowGradient]:
  """`TableGradients.first` of a later window, from 1 to its last."""
  exchange = _exchange(config)

  def on_device(rest, index):
    windows = _windows_of(config, exchange, rest.gradients)
    found = loss_scale.divided(_rows_of(windows, index), rest.scale)
    return _pairs(scaled(found, rest.clipping))

  pair = _specs_of_pair(exchange)
  specs = dict.fromkeys(rest.gradients, pair)
  found = on_each_device(on_device, specs)(rest, index)
  return {path: RowGradient(*of) for path, of in found.items()}


def windows_of(
  gradients: TableGradients, later: Callable[[RestOfRows, np.int32], dict]
) -> Iterator[dict[str, RowGradient]]:
  """The gradient of rows within the budget, then by `later` of the others."""
  yield gradients.first
  if gradients.rest is not None:
    for i in range(1, int(gradients.rest.num_passes)):
      yield later(gradients.rest, np.int32(i))


def num_row_pieces(config: Config) -> int:
  """Into how many pieces the mesh in use cuts the rows of tables."""
  exchange = _exchange(config)
  return exchange.num_rows // exchange.num_own_rows


def _windows_of(config, exchange, gradients):
  is_fixed = config.model.memory.table.gradient == 'deterministic'
  budget = config.optimizer.value_row_budget
  return {
    path: RowWindows(exchange, *of, is_fixed, budget)
    for path, of in gradients.items()
  }


def _is_one_pass(config, exchange, gradients) -> bool:
  """Whether one window is sure to hold all rows of each table."""

  def on_device(gradients):
    windows = _windows_of(config, exchange, gradients).values()
    found.append(all(w.is_one for w in windows))
    return jnp.int32(0)

  found: list[bool] = []
  jax.eval_shape(on_each_device(on_device, jax.P()), gradients)
  return found[0]


def _specs_of_pair(exchange: TableExchange) -> tuple[jax.P, jax.P]:
  """How rows and values of a gradient lie, by axes that split something."""
  rows = exchange.row_axes or None
  return jax.P(rows), jax.P(rows, exchange.column_axes or None)


def _pairs(gradients: dict[str, RowGradient]) -> dict[str, tuple]:
  return {path: (g.slot, g.value) for path, g in gradients.items()}


_ROW_COUNTS = ('value_rows_touched', 'value_rows_over_budget')


def _exchange(config: Config) -> TableExchange:
  axes = mesh.axis_sizes()
  if axes is None:
    layout, axes = mesh.TABLE_LAYOUTS['columns'], dict.fromkeys(mesh.AXES, 1)
  else:
    model = config.model
    layout = mesh.table_layout(table_scheme(model.sized_memory, model.dtype))
  return TableExchange(layout, axes, config.model.memory.table_rows)


def _step(config, exchange, windows, tables, state, other_square, key, scale):
  """One device's part of `update_tables`."""
  optimizer = make_row_optimizer(
    config.optimizer, config.train.num_steps, exchange.column_axes
  )
  # Its own count: steps that were left out are none of its.
  step = optax.tree_utils.tree_get(state, 'count')

  gradients, num_passes, square = _first_and_norm(windows, exchange, scale)
  norm = jnp.sqrt(other_square + exchange.total(square))
  clipping = clip_scale(norm, config.optimizer.clip_norm)
  origin = (exchange.first_row(), exchange.column_part())
  is_finite = jnp.isfinite(norm)

  def one_pass(gradients, tables, state):
    gradients = scaled(gradients, clipping)
    if scale is not None:
      gradients = _only_if(is_finite, gradients, tables)
    updates, state = optimizer.update(gradients, state, tables, step=step)
    return apply_updates(tables, updates, key, origin), state

  before = state
  if gradients is not None:
    tables, state = one_pass(gradients, tables, state)
  else:
    tables, state = jax.lax.fori_loop(
      0,
      num_passes,
      lambda i, carry: one_pass(
        loss_scale.divided(_rows_of(windows, i), scale), *carry
      ),
      (tables, state),
    )
  if scale is not None:
    # The state's arrays, [M] or [M, W], were changed in these rows alone.
    state = jax.tree.map(
      lambda new, old: new if new.ndim else jnp.where(is_finite, new, old),
      state,
      before,
    )
  return tables, state, norm, _counts(exchange, jax.tree.leaves(windows))


def _first_and_norm(windows, exchange, scale):
  """The gradients if one window has all rows, windows, and the squared norm.

  Rows beyond the budget wait for another pass; the norm needs them first.
  """
  leaves = jax.tree.leaves(windows)
  if all(w.is_one for w in leaves):
    gradients = loss_scale.divided(_rows_of(windows, 0), scale)
    return gradients, jnp.int32(1), squared_norm(gradients)
  num_passes = exchange.pmax(jnp.stack([w.num_passes for w in leaves]).max())

  def add_square(i, square):
    found = loss_scale.divided(_rows_of(windows, i), scale)
    return square + squared_norm(found)

  square = jax.lax.fori_loop(0, num_passes, add_square, jnp.float32(0))
  return None, num_passes, square


def _counts(exchange, windows):
  touched = sum(w.num_distinct for w in windows)
  over = sum(jnp.maximum(w.num_distinct - w.budget, 0) for w in windows)
  counts = (exchange.total_rows(x) for x in (touched, over))
  return dict(zip(_ROW_COUNTS, counts, strict=True))


def _rows_of(windows, index):
  """The gradient of one window of each table."""
  return jax.tree.map(lambda window: window(index), windows)


def _only_if(is_finite, gradients, tables):
  """The gradients, or after an overflow those of no row.

  A choice between changed tables and those before would need both.
  """

  def keep(gradient, table):
    slot = gradient.slot
    beyond = len(table) + jnp.arange(len(slot), dtype=slot.dtype)
    slot = jnp.where(is_finite, slot, beyond)
    return dataclasses.replace(gradient, slot=slot)

  return jax.tree.map(keep, gradients, tables, is_leaf=is_row_gradient)
