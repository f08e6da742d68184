"""UltraMem: a memory layer of many small values (arXiv:2411.12364).

A token's query meets Q row keys and Q column keys; a Tucker core turns their
rank scores into the scores of Q x Q cells, of which each head keeps m. A kept
cell's address is scattered to a virtual block and a physical slot; the slots'
values, weighted by the scores (no softmax), are pooled per block, and one
matrix maps the pools to the model width.

The layer works in any Linen module; it needs no other part of jaxsparse:
`y, metrics = MemoryLayer(MemoryConfig())(x)`.

Letters: B batch, T positions, D model width, k query width, w key width, Q
logical keys per axis, P heads, r ranks, c cores, m kept cells per head, E
virtual blocks, M slots, W value width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse import mesh
from jaxsparse.config import MemoryConfig
from jaxsparse.nn.memory_init import parameters
from jaxsparse.ops import addressing, usage
from jaxsparse.ops.sharded_bag import sharded_value_bag
from jaxsparse.ops.table_scheme import (
  TableUse,
  choose_scheme,
  describe_scheme,
)
from jaxsparse.ops.tucker import (
  Directions,
  lower_singular_loss,
  singular_values,
  tucker_top_m,
)

Metrics = dict[str, jax.Array]

# The inputs before the first position, and their segment ids.
Context = tuple[Float[Array, 'B S D'], Int[Array, 'B S']]

# Collections of variables for the row-sparse gradient of the value table.
TAPS, ENTRIES = 'taps', 'entries'

_NORM_EPSILON = 1e-5


class MemoryLayer(nn.Module):
  """The memory layer.

  Attributes:
    config: sizes and variants.
    num_layers: blocks of the model, for the scale of the values (`paper`).
    dtype: type of the activations; parameters are f32, and so are scores,
      norms and sums of values.
    salt: picks the bijection of this layer's addresses. A trained layer needs
      the salt it was trained with.
    is_partial: leave the output's sum over the mesh axis `model` to the caller,
      see `mesh.partial`.
  """

  config: MemoryConfig
  num_layers: int = 1
  dtype: jax.typing.DTypeLike = jnp.float32
  salt: int = 0
  is_partial: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'B T D'],
    segment_ids: Int[Array, 'B T'] | None = None,
    context: Context | None = None,
    *,
    directions: Directions | None = None,
    permutation: Int[Array, 'V'] | None = None,
  ) -> tuple[Float[Array, 'B T D'], Metrics]:
    """Reads the memory.

    Args:
      x: input of each position.
      segment_ids: documents, between which the query convolution does not
        look; by default all positions are of one.
      context: the taps - 1 inputs before `x`, for the query convolution while
        decoding; by default there is nothing before.
      directions: pre-filter vectors of an imported checkpoint.
      permutation: table of virtual addresses of an imported checkpoint.

    Given a variable 'pooled' in the collection `TAPS`, zeros in the shape of
    the pools [B, T, E, W], the value table gets no gradient: that of the tap
    and the entries sown in `ENTRIES` are the table's gradient row by row.

    Returns:
      The output, and scalars: 'aux_loss', already weighted; 'slots_used' and
      'unevenness' over the whole batch; 'score_mean' and 'score_std' of the
      kept scores; 'core_singular_0' and on, mean over heads.

    Raises:
      UserError: the scheme cuts the table into uneven or too narrow slices.
    """
    declared = parameters(
      self.config,
      x.shape[-1],
      self.num_layers,
      table_scheme(self.config, self.dtype),
    )
    params = {
      name: self.param(name, mesh.sharded(init, spec), shape)
      for name, (init, spec, shape) in declared.items()
    }
    tap = None
    if self.has_variable(TAPS, 'pooled'):
      tap = self.get_variable(TAPS, 'pooled')
    y, read = memory_forward(
      params,
      x.astype(self.dtype),
      self.config,
      segment_ids=segment_ids,
      context=context,
      directions=directions,
      permutation=permutation,
      salt=self.salt,
      tap=tap,
      is_partial=self.is_partial,
    )
    self.sow('intermediates', 'slots', read['slots'])
    if tap is not None:
      self.sow(
        ENTRIES, 'pooled', (read['slots'], read['weights'], read['blocks'])
      )
    return y, memory_metrics(params, read, self.config)


def table_use(config: MemoryConfig, dtype: jax.typing.DTypeLike) -> TableUse:
  """Sizes of the layer's table and of what a token reads of it."""
  return TableUse(
    num_rows=config.table_rows,
    width=config.value_dim,
    num_reads=config.num_heads * config.num_selected,
    num_cores=config.num_cores,
    num_groups=config.expansion,
    table_bytes=jnp.dtype(config.value_dtype).itemsize,
    wire_bytes=jnp.dtype(dtype).itemsize,
  )


def table_scheme(config: MemoryConfig, dtype: jax.typing.DTypeLike) -> str:
  """The scheme in use on the present mesh, 'auto' resolved.

  Raises:
    UserError: the scheme cuts the table into uneven or too narrow slices.
  """
  axes = mesh.axis_sizes()
  if axes is None:
    return 'columns'
  use = table_use(config, dtype)
  return choose_scheme(config.scheme, use, axes, jax.default_backend())


def describe_table(config: MemoryConfig, dtype: jax.typing.DTypeLike) -> str:
  """One line: how the value table is split, and what a token sends.

  Raises:
    UserError: the scheme cuts the table into uneven or too narrow slices.
  """
  axes = mesh.axis_sizes() or dict.fromkeys(mesh.AXES, 1)
  scheme = table_scheme(config, dtype)
  return describe_scheme(scheme, table_use(config, dtype), axes)


def memory_forward(
  params: dict[str, jax.Array],
  x: Float[Array, 'B T D'],
  config: MemoryConfig,
  *,
  segment_ids: Int[Array, 'B T'] | None = None,
  context: Context | None = None,
  directions: Directions | None = None,
  permutation: Int[Array, 'V'] | None = None,
  salt: int = 0,
  tap: Float[Array, 'B T E W'] | None = None,
  is_partial: bool = False,
) -> tuple[Float[Array, 'B T D'], dict[str, jax.Array]]:
  """The layer as a function of its parameters; `MemoryLayer` explains the rest.

  Returns:
    The output in the type of `x`, and what was read: 'scores' [B, T, P, m, c];
    'slots', 'weights' and 'blocks' [B, T, P * m (, c)], the entries of the
    value bag; 'hits' [M], over the whole batch.
  """
  weights = {
    name: mesh.gather(value, _COMPUTE_DIMS.get(name, '.' * value.ndim))
    for name, value in params.items()
    if name != 'value_table'
  }
  h = x
  if 'query_conv' in weights:
    h = _convolve(
      x, weights['query_conv'].astype(x.dtype), segment_ids, context
    )
  query = jnp.einsum('btd,dsk->btsk', h, weights['query'].astype(x.dtype))
  query = _rms_norm(query, weights['query_scale'], axis=-1)
  keys = _rms_norm(weights['keys'], weights['key_scale'], axis=-2)

  def retrieve(query, keys, cores, directions, permutation):
    return _retrieve(query, keys, cores, directions, permutation, config, salt)

  scores, slots, blocks, hits = mesh.over_tokens(retrieve, (1, 2, 3, 4))(
    query, keys, weights['cores'], directions, permutation
  )
  entry_weights = scores.reshape(*slots.shape, -1)
  table = params['value_table']
  pooled = sharded_value_bag(
    table if tap is None else jax.lax.stop_gradient(table),
    slots,
    entry_weights,
    blocks,
    config.expansion,
    scheme=table_scheme(config, x.dtype),
    dtype=x.dtype,
    table_gradient=config.table_gradient,
  )
  if tap is not None:
    pooled += tap
  y = jnp.einsum(
    'btew,ewd->btd',
    pooled,
    weights['output'].astype(x.dtype),
    out_sharding=mesh.partial('BTD') if is_partial else mesh.act('BTD'),
  )
  read = dict(scores=scores, slots=slots, weights=entry_weights, blocks=blocks)
  return y, read | dict(hits=hits.sum(0))


# Dimensions whose storage is spread over devices, see `memory_init`.
_COMPUTE_DIMS = {'query': 'D..', 'query_conv': '.D', 'output': '.WD'}


def _retrieve(query, keys, cores, directions, permutation, config, salt):
  """One device's tokens: query [B, T, 2, k] to scores, slots, blocks, hits."""
  batch = query.shape[:2]
  query = query.reshape(-1, *query.shape[2:])
  row, column = (_rank_scores(query[:, s], keys[:, s]) for s in range(2))
  scores, address = tucker_top_m(
    row,
    column,
    cores,
    config.num_selected,
    directions=directions,
    two_quadrants=config.use_two_quadrants,
  )
  if permutation is None:
    virtual = addressing.shuffle(address, config.num_logical_keys, salt)
  else:
    virtual = addressing.look_up(address, permutation)
  block, slot = addressing.split(virtual, config.num_slots)
  hits = usage.count_hits(slot, config.num_slots)
  scores = scores.reshape(*batch, *scores.shape[1:])
  slot, block = (x.reshape(*batch, -1) for x in (slot, block))
  return scores, slot, block if config.expansion > 1 else None, hits[None]


def _rank_scores(
  query: Float[Array, 'T k'], keys: Float[Array, 'P Q w r']
) -> Float[Array, 'T P Q r']:
  """Inner products with all keys; narrow keys meet slices of the query."""
  width, ranks = keys.shape[2:]
  if query.shape[1] == width:
    return jnp.einsum('tk,pqkr->tpqr', query, keys)
  slices = query.reshape(-1, ranks, width)
  return jnp.einsum('trk,pqkr->tpqr', slices, keys)


def _rms_norm(x, scale, axis):
  """x / rms(x) * scale along `axis`, in f32 at least."""
  x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  shape = [1] * x.ndim
  shape[axis] = -1
  square = jnp.mean(x * x, axis=axis, keepdims=True)
  return x * jax.lax.rsqrt(square + _NORM_EPSILON) * scale.reshape(shape)


def _convolve(x, kernel, segment_ids, context):
  """Causal depth-wise convolution over time, within a document.

  kernel[i] weighs the input i positions back. Inputs of other documents count
  as zero.
  """
  num_taps, num_positions = kernel.shape[0], x.shape[1]
  past = num_taps - 1
  if context is None:
    inputs = jnp.pad(x, ((0, 0), (past, 0), (0, 0)))
    if segment_ids is not None:
      segments = jnp.pad(segment_ids, ((0, 0), (past, 0)))
  else:
    inputs = jnp.concatenate([context[0].astype(x.dtype), x], axis=1)
    if segment_ids is not None:
      segments = jnp.concatenate([context[1], segment_ids], axis=1)
  y = jnp.zeros_like(x)
  for i in range(num_taps):
    window = slice(past - i, past - i + num_positions)
    earlier = inputs[:, window]
    if segment_ids is not None:
      is_same = segments[:, window] == segment_ids
      earlier = jnp.where(is_same[..., None], earlier, 0)
    y += kernel[i][None, None] * earlier
  return y


def memory_metrics(
  params: dict[str, jax.Array],
  read: dict[str, jax.Array],
  config: MemoryConfig,
) -> Metrics:
  """Scalars of one pass, from what `memory_forward` read."""
  aux_loss = lower_singular_loss(params['cores'], config.aux_loss_margin)
  values = singular_values(jax.lax.stop_gradient(params['cores'].sum(0)))
  scores = jax.lax.stop_gradient(read['scores'])
  metrics = {
    'aux_loss': config.aux_loss_weight * aux_loss,
    'slots_used': usage.share_used(read['hits']),
    'unevenness': usage.unevenness(read['hits']),
    'score_mean': scores.mean(),
    'score_std': scores.std(),
  }
  for i, value in enumerate(values.mean(0)):
    metrics[f'core_singular_{i}'] = value
  return metrics
