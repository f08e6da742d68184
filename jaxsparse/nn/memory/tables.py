# SPDX-License-Identifier: Apache-2.0
"""The tables of memory layers: how they are split, and the one that all share.

Letters: B batch, T positions, M rows, W value width, U pre-value width.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import DenyList

from jaxsparse import mesh
from jaxsparse.config import MemoryConfig
from jaxsparse.nn.memory.init import table_parameters
from jaxsparse.nn.parameter import Parameter, parameter
from jaxsparse.ops.memory.table_scheme import (
  TableUse,
  choose_scheme,
  describe_scheme,
)

# Collections of variables for the row-sparse gradient of the tables: zeros that
# are added to what is made of their rows, and `TableReads`.
PROBES, ENTRIES = 'probes', 'entries'
# Collection of the keys that tables are drawn with, as data [2]: where it is
# asked for by its name, `init` keeps them in it.
KEYS = 'table_keys'
# The table of whose rows each is.
TABLE_OF = dict(pooled='value_table', products='pre_value_table')

Tables = dict[str, Parameter]


class SharedTables(nn.Module):
  """Holds the tables that all memory layers of a model read."""

  config: MemoryConfig
  model_dim: int
  num_layers: int = 1
  dtype: jax.typing.DTypeLike = jnp.float32

  @nn.compact
  def __call__(self) -> Tables:
    config = self.config.for_width(self.model_dim)
    declared = table_parameters(
      config,
      self.model_dim,
      self.num_layers,
      table_scheme(config, self.dtype),
    )
    return {
      name: mesh.whole(
        parameter(
          self, name, keeping_key(self, name, mesh.sharded(init, spec)), shape
        )
      )
      for name, (init, spec, shape) in declared.items()
    }


def keeping_key(module: nn.Module, name: str, init: Callable) -> Callable:
  """The initializer `init` of a table, which keeps its key in `KEYS`.

  So a table that lies elsewhere is drawn by slices, and never made whole.
  """
  assert module.scope is not None
  asked = module.scope.mutable
  # All collections mutable do not ask for it.
  is_asked = not isinstance(asked, bool | DenyList) and (
    module.is_mutable_collection(KEYS)
  )
  if not is_asked or not name.endswith('_table'):
    return init

  def keep_key(key, shape):
    module.put_variable(KEYS, name, jax.random.key_data(key))
    return init(key, shape)

  return keep_key


def table_use(config: MemoryConfig, dtype: jax.typing.DTypeLike) -> TableUse:
  """Sizes of the layer's value table and of what a token reads of it.

  As `config` says them: see `MemoryConfig.for_width`.
  """
  return TableUse(
    num_rows=config.table_rows,
    width=config.value_dim,
    num_reads=config.num_heads * config.num_selected,
    num_cores=config.num_weights,
    num_pools=config.num_pools,
    table_bytes=jnp.dtype(config.table.dtype).itemsize,
    wire_bytes=jnp.dtype(dtype).itemsize,
    pre_value_width=config.pre_value_dim,
  )


def table_scheme(config: MemoryConfig, dtype: jax.typing.DTypeLike) -> str:
  """The scheme in use on the present mesh, 'auto' resolved.

  Raises:
    UserError: the scheme cuts a table into uneven or too narrow slices.
  """
  axes = mesh.axis_sizes()
  if axes is None:
    return 'columns'
  use = table_use(config, dtype)
  return choose_scheme(config.table.scheme, use, axes, mesh.platform())


def describe_table(config: MemoryConfig, dtype: jax.typing.DTypeLike) -> str:
  """One line: how the value table is split, and what a token sends.

  Raises:
    UserError: the scheme cuts the table into uneven or too narrow slices.
  """
  axes = mesh.axis_sizes() or dict.fromkeys(mesh.AXES, 1)
  scheme = table_scheme(config, dtype)
  return describe_scheme(scheme, table_use(config, dtype), axes)
