# SPDX-License-Identifier: Apache-2.0
"""Memory layers: PKM, PEER, Memory+, UltraMem, UltraMemV2 (see `MemoryConfig`).

A token's query meets Q row keys and Q column keys, and each head keeps the k
best of Q x Q cells. A kept cell's address is a slot, a row of the value table;
the slots' values, weighted by their scores, are pooled and mapped to the model
width. In UltraMem (arXiv:2411.12364) a Tucker core turns rank scores into the
cells' scores, no softmax follows, and addresses are scattered to E virtual
blocks that are pooled apart. PEER (arXiv:2407.04153) and UltraMemV2
(arXiv:2508.18756) scale each weight by the product of the input with a row of a
second table, Memory+ (arXiv:2412.09764) gates the pooled values.

The layer works in any Linen module; it needs no other part of jaxsparse:
`y, metrics = MemoryLayer(MemoryConfig())(x)`.

Letters: B batch, T positions, D model width, q query width, w key width, Q
logical keys per axis, P heads, r ranks, c cores, k selected cells per head, E
virtual blocks or pools, M rows, W value width, U pre-value width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, overload

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import DenyList
from jaxtyping import Array, Float, Int, Num

from jaxsparse import mesh
from jaxsparse.config import MemoryConfig
from jaxsparse.nn.door import portable
from jaxsparse.nn.leading import Leading
from jaxsparse.nn.memory.context import Context, Ring
from jaxsparse.nn.memory.init import parameters
from jaxsparse.nn.memory.metrics import Metrics, memory_metrics
from jaxsparse.nn.memory.retrieval import Read, retrieve
from jaxsparse.nn.memory.tables import (
  ENTRIES,
  PROBES,
  Tables,
  keeping_key,
  table_scheme,
)
from jaxsparse.nn.parameter import Parameter, gathered, parameter
from jaxsparse.ops.memory.folded_keys import FoldedKeys
from jaxsparse.ops.memory.sharded_bag import (
  ask_for_rows,
  sharded_gathered_dot,
  sharded_value_bag,
)
from jaxsparse.ops.memory.table_reads import TableReads
from jaxsparse.ops.memory.tucker import Directions
from jaxsparse.ops.tables.host_table import HostTable
from jaxsparse.ops.token_product import token_product


@dataclasses.dataclass(frozen=True)
class Awaited:
  """An output whose rows the host fetches while other blocks run.

  Attributes:
    after: of an activation [B, T, D]: the output [B, T, D], whose rows are
      waited for when the activation is there.
  """

  after: Callable[[jax.Array], jax.Array]


class MemoryLayer(nn.Module):
  """The memory layer.

  Attributes:
    config: sizes and variants.
    num_layers: blocks of the model, for the scale of the values.
    dtype: type of the activations and the output, by default that of the input;
      parameters are f32, and so are scores, norms and sums of values.
    salt: picks the bijection of this layer's addresses. A trained layer needs
      the salt it was trained with.
    first_row: of this layer's window in a shared table.
    is_partial: leave the output's sum over the mesh axis `model` to the caller,
      see `mesh.partial`; needs an output map.
    axes: names of the mesh axes of a program of your own, see `mesh.Axes`.
  """

  config: MemoryConfig
  num_layers: int = 1
  dtype: jax.typing.DTypeLike | None = None
  salt: int = 0
  first_row: int = 0
  is_partial: bool = False
  axes: mesh.Axes = mesh.DEFAULT_AXES

  # Of a call that does not say otherwise, the output is an array.
  @overload
  def __call__(
    self,
    x: Num[Array, '*S D'],
    segment_ids: Int[Array, '*S'] | None = None,
    context: Context | None = None,
    *,
    tables: Tables | None = None,
    directions: Directions | None = None,
    permutation: Int[Array, 'V'] | None = None,
    is_for_later: Literal[False] = False,
  ) -> tuple[Float[Array, '*S D'], Metrics]: ...

  @overload
  def __call__(
    self,
    x: Num[Array, '*S D'],
    segment_ids: Int[Array, '*S'] | None = None,
    context: Context | None = None,
    *,
    tables: Tables | None = None,
    directions: Directions | None = None,
    permutation: Int[Array, 'V'] | None = None,
    is_for_later: bool,
  ) -> tuple[Float[Array, '*S D'] | Awaited, Metrics]: ...

  @nn.compact
  @portable(
    whole=('directions', 'permutation'),
    mixes_positions=lambda layer: layer.config.query_conv_taps > 1,
  )
  def __call__(
    self,
    x: Num[Array, '*S D'],
    segment_ids: Int[Array, '*S'] | None = None,
    context: Context | None = None,
    *,
    tables: Tables | None = None,
    directions: Directions | None = None,
    permutation: Int[Array, 'V'] | None = None,
    is_for_later: bool = False,
  ) -> tuple[Float[Array, '*S D'] | Awaited, Metrics]:
    """Reads the memory.

    Args:
      x: input of each position; the last leading dimension is that of
        positions, those before it number sequences.
      segment_ids: documents, between which the query convolution does not
        look, and 0 for padding, which no metric counts; by default all
        positions are of one document.
      context: the taps - 1 inputs before `x`, for the query convolution while
        decoding; by default there is nothing before. Of a single position it
        may be a `Ring`.
      tables: what `SharedTables` holds; by default the layer has its own.
      directions: pre-filter vectors of an imported checkpoint.
      permutation: table of virtual addresses of an imported checkpoint.
      is_for_later: whether the output may be `Awaited`, where the host has to
        fetch the rows that make it.

    With `ENTRIES` and `PROBES` among the collections, the tables get no
    gradient (`row_value_and_grad`): that of the probes, zeros that are added to
    the pools [*S, E, W] under the name 'pooled' and with pre-values to the
    'products' [*S, P * k], and the `TableReads` sown in `ENTRIES` are the
    tables' gradients row by row. Where `PROBES` is mutable, probes that are
    missing are made. A layer that is called again has 'pooled_1' and so on.

    Returns:
      The output, and scalars: 'aux_loss', already weighted; 'usage_fraction'
      and 'usage_kl' of the slots over the whole batch; 'score_mean' and
      'score_std' of the kept scores; with a Tucker core 'core_singular_0' and
      on, mean over heads.

    Raises:
      UserError: the scheme cuts a table into uneven or too narrow slices, a
        width that must be the model's is not, or `x` holds integers.
    """
    lead = Leading.of(x)
    x, segment_ids = lead.flat(x), lead.flat(segment_ids, 'segment_ids')
    if context is not None:
      before = Leading(context[1].shape)
      # Without taps there is nothing to look back to.
      is_none = lead.is_empty or before.is_empty
      flat = map(before.flat, context)
      is_ring = isinstance(context, Ring)
      context = Ring(*flat) if is_ring else tuple(flat)
      context = None if is_none else context
    config = self.config.for_width(x.shape[-1])
    dtype = x.dtype if self.dtype is None else self.dtype
    scheme = table_scheme(config, dtype)
    declared = parameters(
      config,
      x.shape[-1],
      self.num_layers,
      scheme if tables is None else None,
    )
    params = {
      name: mesh.whole(
        parameter(
          self, name, keeping_key(self, name, mesh.sharded(init, spec)), shape
        )
      )
      for name, (init, spec, shape) in declared.items()
    }
    probes = self._probes(config, lead, dtype)
    y, read = memory_forward(
      params | (tables or {}),
      x.astype(dtype),
      config,
      segment_ids=segment_ids,
      context=context,
      directions=directions,
      permutation=permutation,
      salt=self.salt,
      first_row=self.first_row,
      probes=probes,
      is_partial=self.is_partial,
      is_for_later=is_for_later,
    )
    for name in ('slots', 'rows'):
      self.sow('intermediates', name, lead.restored(read[name]))
    for name in probes:
      self._sow_reads(name, read, config, scheme, lead)
    metrics = memory_metrics(params, read, config, segment_ids)
    y = y if isinstance(y, Awaited) else lead.restored(y)
    return y, lead.metrics(metrics)

  def _probes(self, config, lead, dtype):
    """Zeros of this call by name [B, T, ...]; none if not asked for."""
    shapes: dict[str, tuple[int, ...]] = dict(
      pooled=(config.num_pools, config.value_dim)
    )
    if config.pre_value_dim:
      shapes['products'] = (config.num_heads * config.num_selected,)
    # Asked for by its name: all collections mutable do not ask for it.
    assert self.scope is not None
    asked = self.scope.mutable
    makes = not isinstance(asked, bool | DenyList) and (
      self.is_mutable_collection(PROBES)
    )
    calls, probes = self._num_calls(), {}
    for name, shape in shapes.items():
      stored = f'{name}_{calls}' if calls else name
      if self.has_variable(PROBES, stored):
        probe = self.get_variable(PROBES, stored)
      elif makes:
        probe = jnp.zeros((*lead.shape, *shape), dtype)
        self.put_variable(PROBES, stored, probe)
      else:
        continue
      dims = 'BT.W' if name == 'pooled' else 'BT.'
      probes[name] = mesh.reshard(lead.flat(probe), mesh.act(dims))
    return probes

  def _num_calls(self):
    """Calls before this one in the same pass."""
    if not self.has_variable(ENTRIES, 'pooled'):
      return 0
    return len(self.get_variable(ENTRIES, 'pooled'))

  def _sow_reads(self, name, read, config, scheme, lead):
    view = mesh.inside()
    if mesh.axis_sizes() is not None:
      layout = mesh.table_layout(scheme)
    else:
      layout = view.tables if view else mesh.WHOLE
    is_bag = name == 'pooled'
    factor = read['weights'] if is_bag else read['vectors']
    pool = read['pools'] if is_bag else None
    reads = TableReads(
      lead.restored(read['rows']),
      lead.restored(factor),
      None if pool is None else lead.restored(pool),
      layout,
      config.table_rows,
      config.table.gradient == 'deterministic',
    )
    self.sow(ENTRIES, name, reads)


def memory_forward(
  params: dict[str, Parameter],
  x: Float[Array, 'B T D'],
  config: MemoryConfig,
  *,
  segment_ids: Int[Array, 'B T'] | None = None,
  context: Context | None = None,
  directions: Directions | None = None,
  permutation: Int[Array, 'V'] | None = None,
  salt: int = 0,
  first_row: int = 0,
  probes: dict[str, jax.Array] | None = None,
  is_partial: bool = False,
  is_for_later: bool = False,
) -> tuple[Float[Array, 'B T D'] | Awaited, Read]:
  """The layer as a function of its parameters; `MemoryLayer` explains the rest.

  Returns:
    The output in the type of `x`, and what was read: what `retrieve` returns,
    'weights' being those of the value bag, and with pre-values 'vectors'
    [B, T, U], whose products with the rows of their table they contain.
  """
  config = config.for_width(x.shape[-1])
  weights = {
    name: value
    if value is None or isinstance(value, FoldedKeys)
    else gathered(value, _COMPUTE_DIMS.get(name) or '.' * value.ndim)
    for name, value in params.items()
    if not name.endswith('_table')
  }
  if permutation is None and config.stored_addresses:
    # No gradient leads there, and nothing decays it.
    addresses = weights['addresses']
    assert isinstance(addresses, jax.Array)
    permutation = jax.lax.stop_gradient(addresses).astype(jnp.int32)
  read = retrieve(
    weights,
    x,
    config,
    segment_ids=segment_ids,
    context=context,
    directions=directions,
    permutation=permutation,
    salt=salt,
    first_row=first_row,
  )
  probes = probes or {}
  options: dict[str, Any] = dict(
    scheme=table_scheme(config, x.dtype),
    dtype=x.dtype,
    table_gradient=config.table.gradient,
  )

  def table(name: str) -> Parameter:
    # With probes the gradient goes its own way.
    return jax.lax.stop_gradient(params[name]) if probes else params[name]

  if config.pre_value_dim:
    read['vectors'] = _vectors(weights, x)
    products = sharded_gathered_dot(
      table('pre_value_table'), read['rows'], read['vectors'], **options
    )
    products += probes.get('products', 0)
    activation = _ACTIVATIONS[config.pre_value_activation]
    read['weights'] *= activation(products)[..., None].astype(
      read['weights'].dtype
    )

  def output(**fetching):
    pooled = sharded_value_bag(
      table('value_table'),
      read['rows'],
      read['weights'],
      read['pools'],
      config.num_pools,
      **options,
      **fetching,
    )
    pooled += probes.get('pooled', 0)
    return _output(weights, x, pooled, is_partial)

  # With pre-values, rows have been waited for already.
  is_for_later &= isinstance(params['value_table'], HostTable)
  if not is_for_later or config.pre_value_dim:
    return output(), read
  asked = ask_for_rows(params['value_table'], read['rows'])
  return Awaited(lambda y: output(asked=asked, after=y)), read


# Dimensions whose storage is spread over devices, see `memory_init`.
_COMPUTE_DIMS = dict(
  query_conv='.D', output='.WD', gate='D.W', pre_value_map='DW'
)

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = dict(
  identity=lambda x: x, relu=jax.nn.relu, gelu=jax.nn.gelu
)


def _vectors(weights, x):
  """What meets the rows of pre-values [B, T, U], split over `model`."""
  if 'pre_value_map' not in weights:
    return mesh.reshard(x, mesh.act('BTW'))
  return token_product(
    'd,du->u',
    x,
    weights['pre_value_map'].astype(x.dtype),
    out_sharding=mesh.act('BTW'),
  )


def _output(weights, x, pooled, is_partial):
  """Pools [B, T, E, W] to [B, T, D]."""
  if 'output' not in weights:
    return mesh.reshard(pooled.sum(axis=2), mesh.act('BTD'))
  if 'gate' in weights:
    gate = token_product('d,dew->ew', x, weights['gate'].astype(x.dtype))
    pooled *= jax.nn.silu(gate)
  return token_product(
    'ew,ewd->d',
    pooled,
    weights['output'].astype(x.dtype),
    out_sharding=mesh.partial('BTD') if is_partial else mesh.act('BTD'),
  )
