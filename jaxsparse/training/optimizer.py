# SPDX-License-Identifier: Apache-2.0
"""Optimizers by labelled groups: value tables, decayed and undecayed leaves.

The value tables of memory layers have a learning rate of their own, a multiple
of the model's that falls linearly to it over training (UltraMem,
arXiv:2411.12364), and their own weight decay.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from jaxsparse import mesh
from jaxsparse.config import OptimizerConfig
from jaxsparse.config.errors import require_choice
from jaxsparse.training import schedules
from jaxsparse.training.optimizers.each_device import on_each_device, specs_of
from jaxsparse.training.optimizers.finalizing import (
  Optimizer,
  partition,
  unchanged,
)
from jaxsparse.training.optimizers.muon import muon
from jaxsparse.training.optimizers.row_optimizers import row_adagrad, row_adam
from jaxsparse.training.optimizers.row_updates import (
  in_float32,
  with_float32_master,
)

# Names of the maps that read the residual stream, [D, ...], and of those that
# write to it, [..., D]; by the module that has them.
_READING = dict(
  attention=('query', 'key', 'value'),
  mlp=('up', 'gate'),
  shared=('up', 'gate'),
  memory=('query', 'gate', 'pre_value_map'),
)
_WRITING = dict(
  attention=('output',), mlp=('down',), shared=('down',), memory=('output',)
)
# Those of all experts at once, [X, D, F] or [X, F, D].
_EXPERTS = ('up', 'gate', 'down')

# Makes a row optimizer of its settings, the learning rate, and the mesh axes
# that split columns of the tables.
MakeRowOptimizer = Callable[
  [OptimizerConfig, optax.Schedule, tuple[str, ...]], Optimizer
]


def _row_adam(catch_up: bool) -> MakeRowOptimizer:
  return lambda config, rate, _: row_adam(
    rate,
    config.b1,
    config.b2,
    config.epsilon,
    config.value_weight_decay,
    catch_up,
  )


# By the names that `OptimizerConfig.value_optimizer` may have beside 'adamw'.
ROW_OPTIMIZERS: dict[str, MakeRowOptimizer] = {
  'row_adam': _row_adam(catch_up=True),
  'lazy_row_adam': _row_adam(catch_up=False),
  'row_adagrad': lambda config, rate, column_axes: row_adagrad(
    rate, config.epsilon, column_axes
  ),
}

VALUES, DECAYED, UNDECAYED = 'values', 'decayed', 'undecayed'
# Of the decayed leaves those that Muon takes: the maps of activations.
MATRICES = 'matrices'
# Biases of the experts' selection, which follow the load and not the loss.
BALANCE = 'balance'


def make_optimizer(
  config: OptimizerConfig,
  num_steps: int,
  scheme: str = 'columns',
  bias_update_rate: float = 0.0,
) -> Optimizer:
  """AdamW, each group with its decay and rate; or Muon for matrices.

  Gradients come clipped. The state of value tables is in f32 and split over
  all devices, those that hold copies of a table included; a bf16 table has an
  f32 master there with `value_master`. Where there are copies, each device
  takes the step for its rows, and the updates are gathered (ZeRO, stage 1,
  arXiv:1910.02054). With a row optimizer, the state of value tables is made and
  finalized here, but stepped by `table_step.update_tables`.

  Args:
    config: rates and decays.
    num_steps: optimizer steps of the whole run, over which schedules spread.
    scheme: by which value tables are split over the mesh.
    bias_update_rate: step of the biases that balance experts
      (arXiv:2408.15664), whose gradient is the experts' load.
  """
  rate = schedules.learning_rate(config, num_steps)
  value_rate = schedules.value_learning_rate(config, num_steps)

  def group(weight_decay: float, schedule: optax.Schedule):
    return optax.chain(
      optax.scale_by_adam(config.b1, config.b2, config.epsilon),
      optax.add_decayed_weights(weight_decay),
      optax.scale_by_learning_rate(schedule),
    )

  wide = with_float32_master if config.value_master else in_float32
  values = wide(group(config.value_weight_decay, value_rate))
  values = _split_over_copies(values, scheme)
  if is_by_rows(config):
    values = _stepped_apart(make_row_optimizer(config, num_steps))
  groups = {
    VALUES: values,
    DECAYED: group(config.weight_decay, rate),
    UNDECAYED: group(0.0, rate),
    BALANCE: optax.chain(optax.scale_by_sign(), optax.scale(-bias_update_rate)),
  }
  if config.name == 'adamw':
    return partition(groups, labels)
  groups[MATRICES] = muon(
    rate, config.muon_momentum, config.weight_decay, matrix_dimensions
  )
  return partition(groups, labels_with_matrices)


def is_by_rows(config: OptimizerConfig) -> bool:
  """Whether value tables have an optimizer of their own, by rows."""
  return config.value_optimizer != 'adamw'


def require_known(config: OptimizerConfig) -> None:
  """Refuses names of row optimizers that there are not."""
  require_choice(config, 'value_optimizer', ('adamw', *ROW_OPTIMIZERS))


def make_row_optimizer(
  config: OptimizerConfig, num_steps: int, column_axes: tuple[str, ...] = ()
) -> Optimizer:
  """The optimizer of value tables whose gradient is kept row by row.

  Args:
    config: its `value_optimizer` is one of `ROW_OPTIMIZERS`.
    num_steps: optimizer steps of the whole run.
    column_axes: mesh axes that split the tables' columns.

  Raises:
    UserError: there is no optimizer of that name.
  """
  require_known(config)
  rate = schedules.value_learning_rate(config, num_steps)
  optimizer = ROW_OPTIMIZERS[config.value_optimizer](config, rate, column_axes)
  return with_float32_master(optimizer) if config.value_master else optimizer


def _split_over_copies(
  inner: optax.GradientTransformation, scheme: str
) -> optax.GradientTransformation:
  """`inner` on tables split over the devices that hold copies of them too."""

  def split(tables):
    return jax.tree.map(lambda x: mesh.split_copies(x, scheme), tables)

  def update(updates, state, params=None):
    updates, state = inner.update(split(updates), state, split(params))
    table = mesh.table(scheme)
    return jax.tree.map(lambda x: mesh.reshard(x, table), updates), state

  return optax.GradientTransformation(lambda p: inner.init(split(p)), update)


def _stepped_apart(inner: Optimizer) -> Optimizer:
  """`inner`, whose steps are none of the optimizer's that it is part of.

  Each device finalizes its part of the tables.
  """

  def update(updates, state, params=None, **extra):
    del params, extra
    return updates, state

  def finalize(params, state):
    specs = specs_of((params, state))
    return on_each_device(inner.finalize, specs)(params, state)

  return Optimizer(
    inner.init, update, unchanged if inner.is_final else finalize
  )


def squared_norm(gradients: dict) -> jax.Array:
  """Of all gradients; the experts' load, which BALANCE has, is none."""
  of_loss = jax.tree.map(
    lambda label, g: jnp.zeros(()) if label == BALANCE else g,
    labels(gradients),
    gradients,
  )
  return optax.tree.norm(of_loss, squared=True)


def labels(params: dict) -> dict:
  """The group of every leaf, by its name: nothing else distinguishes them."""

  def label(path: tuple, leaf: jax.Array | jax.ShapeDtypeStruct) -> str:
    name = path[-1].key
    if name in ('value_table', 'pre_value_table'):
      return VALUES
    if name == 'router_bias':
      return BALANCE
    # Gains, Tucker cores and DoRA's magnitudes set scales that decay would pull
    # to zero, and both gains and biases, of whatever rank, are no matrices.
    # Differences of rows are what is learned, as tables are.
    undecayed = ('bias', 'scale', 'cores', 'magnitude', 'values')
    has_decay = not name.endswith(undecayed)
    return DECAYED if leaf.ndim > 1 and has_decay else UNDECAYED

  return jax.tree_util.tree_map_with_path(label, params)


def labels_with_matrices(params: dict) -> dict:
  """`labels`, where the maps of activations are a group of their own.

  Embeddings, head, routers, keys and whatever an attention variant adds are
  not among them.
  """
  return jax.tree.map_with_path(
    lambda path, label: MATRICES if _dimensions(path, 2) else label,
    labels(params),
  )


def matrix_dimensions(matrices: dict) -> dict:
  """Of each map of activations, which dimensions are input and output."""
  return jax.tree.map_with_path(
    lambda path, leaf: _dimensions(path, leaf.ndim), matrices
  )


def _dimensions(path: tuple, ndim: int) -> MuonDimensionNumbers | None:
  *_, module, name = ('', *(part.key for part in path))
  if module == 'moe' and name in _EXPERTS:
    return MuonDimensionNumbers(1, 2)
  if name in _READING.get(module, ()):
    return MuonDimensionNumbers((0,), tuple(range(1, ndim)))
  if name in _WRITING.get(module, ()):
    return MuonDimensionNumbers(tuple(range(ndim - 1)), (ndim - 1,))
  return None
