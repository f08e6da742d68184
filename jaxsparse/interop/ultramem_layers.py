# SPDX-License-Identifier: Apache-2.0
"""Memory layers of UltraMem's trainer: UltraMem, UltraMemV2 and Memory+."""

import math
import re
from collections.abc import Callable, Iterable

import jax.numpy as jnp
import numpy as np

from jaxsparse.config import MemoryConfig, ModelConfig
from jaxsparse.config.errors import require, shown
from jaxsparse.config.model import block_name
from jaxsparse.interop.config_json import Fields
from jaxsparse.interop.layout import Layout, Leaf, Part, as_is, transposed
from jaxsparse.interop.source import Source
from jaxsparse.ops.memory import tucker

_LAYERS, _SHARED = 'transformer.mem_blocks', 'transformer.full_memory_layer'
_KINDS = ('ultramem', 'ultramem_v2', 'memory_plus')

Shapes = dict[str, tuple[int, ...]]


def to_config(
  fields: Fields, shapes: Shapes, num_layers: int
) -> MemoryConfig | None:
  """The memory layers of a config.yaml; None if it has none.

  What the config names and what its program derives are the same for all of
  its layers, so that the tensors of the first one say it.

  Raises:
    UserError: a field is missing or says what we do not have.
  """
  kind = fields.take('mem_type', str, '')
  place = fields.take('mem_insert_way', str, '')
  keys_given = fields.take('mem_knum', int, 0)
  selected = fields.take('mem_knn', int, 0)
  share = fields.take('mem_share_ratio', float, 1.0)
  fields.expect('mem_use_glu_act', False)
  fields.skip(
    'mem_kdim',
    'mem_vdim',
    'mem_pre_vdim',
    'mem_head',
    'mem_value_expand_time',
    'mem_key_expand_time',
    'mem_q_for_each_tucker_rank',
    'mem_layer_num',
    'mem_tucker_rank',
    'mem_tucker_multihead',
  )
  if not place:
    return None
  require(
    kind in _KINDS,
    f'mem_type = {shown(kind)} in config.yaml is a memory layer that is not '
    f'known: {", ".join(_KINDS)} are.',
  )
  placements = _placements(place, num_layers)
  first = {
    name.removeprefix(f'{_LAYERS}.0.'): shape
    for name, shape in shapes.items()
    if name.startswith(f'{_LAYERS}.0.')
  }
  values = first.get('values_for_look_up') or shapes.get(
    f'{_SHARED}.values_for_look_up'
  )
  keys, output = first.get('keys'), first.get('values_proj.weight')
  require(
    bool(keys_given and selected and values and keys and output),
    'config.yaml lacks mem_knum or mem_knn, or the checkpoint lacks keys, '
    f'values_proj.weight or values_for_look_up of {_LAYERS}.0.',
  )
  common = dict(
    num_heads=keys[0],
    num_selected=selected,
    value_dim=values[1],
    placements=placements,
    stored_addresses=True,
    aux_loss_weight=0.0,
  )
  if kind == 'memory_plus':
    return MemoryConfig.memory_plus(
      num_keys=keys_given,
      key_dim=keys[3],
      shared_rows=values[0],
      query_bias=False,
      # Its keys are normalised, and then the raw ones used.
      key_norm='none',
      replaces_mlp=False,
      **common,
    )
  num_keys = keys_given
  if kind == 'ultramem_v2':
    # Of a window of the rows that all layers share.
    num_keys = math.isqrt(int(values[0] * share))
  common |= dict(
    num_keys=num_keys,
    key_dim=keys[3],
    tucker_rank=keys[4],
    num_cores=sum(name.startswith('tucker_core.') for name in first),
    expansion=(keys[2] // num_keys) ** 2,
    query='shared',
    init='release',
  )
  if kind == 'ultramem':
    return MemoryConfig.ultramem(**common)
  pre_values = shapes.get(f'{_SHARED}.pre_values_for_look_up', (0, 0))
  return MemoryConfig.ultramem_v2(
    pre_value_dim=pre_values[1],
    shared_rows=values[0],
    pool_by_block=output[1] > values[1],
    **common,
  )


def _placements(text: str, num_layers: int) -> tuple[tuple[int, int], ...]:
  """Pairs of the blocks that a layer reads at and is added after."""
  if text == 'full':
    return tuple((i, i) for i in range(num_layers))
  pairs = [re.fullmatch(r'(\d+):(\d+)', part) for part in text.split('/')]
  require(
    all(pairs),
    f"mem_insert_way = {shown(text)} in config.yaml must be 'full' or pairs of "
    "blocks, such as '2:5/6:9'.",
  )
  return tuple((int(p[1]), int(p[2])) for p in pairs if p)


def adapted(source: Source, config: ModelConfig) -> tuple[Source, Layout]:
  """The source as the layout of its memory layers wants it, and that layout."""
  memory = config.memory
  assert memory
  changes: dict[str, Change] = {}
  dropped, found = set(), {}
  names = set(source.names())
  for j, (read, _) in enumerate(memory.placements):
    theirs, ours = f'{_LAYERS}.{j}', f'{block_name(read)}/memory'
    # Recomputed; what they were is looked at for their sign.
    dropped |= {f'{theirs}.tucker_core_{s}' for s in 'uv'}
    if memory.key_norm == 'none':
      dropped.add(f'{theirs}.keys_norm.weight')
    changes[f'{theirs}.keys'] = _turned_keys(source, names, theirs)
    rows = 2 * memory.key_dim
    if memory.query == 'shared':
      # The released program uses no more of a query map for each rank.
      changes[f'{theirs}.query_proj.weight'] = lambda x, n=rows: x[:n]
    changes[f'{theirs}.shuffle_index'] = _addresses
    found |= _layer(config, memory, ours, theirs)
  found |= _tables(memory)
  return _Changed(source, changes, dropped), found


def _layer(
  config: ModelConfig, memory: MemoryConfig, ours: str, theirs: str
) -> Layout:
  dim, heads, width = config.model_dim, memory.num_heads, memory.key_dim
  logical, pools = memory.num_logical_keys, memory.num_pools
  is_plus = memory.gate
  shapes = {
    'query_scale': ('query_norm.weight', (width,)),
    'keys': ('keys', (heads, 2, logical, width)),
  }
  found = {}
  if is_plus:
    query = Part(f'{theirs}.query_proj.weight', (heads * 2 * width, dim))
    found[f'{ours}/query'] = Leaf(
      (query,),
      lambda parts: (
        parts[0].reshape(heads, 2, width, dim).transpose(3, 1, 0, 2)
      ),
      lambda leaf: [leaf.transpose(2, 1, 3, 0).reshape(-1, dim)],
    )
    gate = Part(f'{theirs}.swilu_projection.weight', (memory.value_dim, dim))
    found[f'{ours}/gate'] = transposed(gate, (dim, 1, memory.value_dim))
    # Theirs has no permutation.
    found[f'{ours}/addresses'] = Leaf(
      (),
      lambda parts: np.arange(logical**2, dtype=np.float32),
      lambda leaf: [],
    )
  else:
    query = Part(f'{theirs}.query_proj.weight', (2 * width, dim))
    found[f'{ours}/query'] = transposed(query, (dim, 2, width))
    ranks = memory.tucker_rank
    shapes['keys'] = 'keys', (heads, 2, logical, width, ranks)
    shapes['key_scale'] = 'keys_norm.weight', (width,)
    shapes['addresses'] = 'shuffle_index', (logical**2,)
    cores = tuple(
      Part(f'{theirs}.tucker_core.{a}', (heads, ranks, ranks))
      for a in range(memory.num_cores)
    )
    found[f'{ours}/cores'] = Leaf(cores, np.stack, list)
  for name, (tensor, shape) in shapes.items():
    part = Part(f'{theirs}.{tensor}', shape)
    found[f'{ours}/{name}'] = as_is(part)
  if is_plus:
    keys = Part(f'{theirs}.keys', (heads, 2, logical, width))
    found[f'{ours}/keys'] = as_is(keys, (heads, 2, logical, width, 1))
  if memory.pre_value_dim:
    pre = Part(f'{theirs}.pre_values_proj.weight', (memory.pre_value_dim, dim))
    found[f'{ours}/pre_value_map'] = transposed(pre)
  output = Part(f'{theirs}.values_proj.weight', (dim, pools * memory.value_dim))
  found[f'{ours}/output'] = transposed(output, (pools, memory.value_dim, dim))
  if not memory.shared_rows:
    found[f'{ours}/value_table'] = _table(
      f'{theirs}.values_for_look_up', memory, memory.value_dim
    )
  return found


def _tables(memory: MemoryConfig) -> Layout:
  """Of what all layers share."""
  if not memory.shared_rows:
    return {}
  names = {'value_table': ('values_for_look_up', memory.value_dim)}
  if memory.pre_value_dim:
    name = 'pre_values_for_look_up'
    names['pre_value_table'] = name, memory.pre_value_dim
  return {
    f'memory/{ours}': _table(f'{_SHARED}.{theirs}', memory, width)
    for ours, (theirs, width) in names.items()
  }


def _table(name: str, memory: MemoryConfig, width: int) -> Leaf:
  """With rows that nothing reads, so that devices can share it evenly."""
  rows = memory.shared_rows or memory.num_slots
  padding = ((0, memory.table_rows - rows), (0, 0))
  return Leaf(
    (Part(name, (rows, width)),),
    lambda parts: np.pad(parts[0], padding),
    lambda leaf: [leaf[:rows]],
  )


def _turned_keys(source: Source, names: set[str], theirs: str) -> Callable:
  """Keys such that our directions, instead of theirs, find the same slots.

  A pair of singular vectors has no sign of its own, and the other one is that
  of scores of the other sign, which keys of the other sign give.
  """
  vector, core = f'{theirs}.tucker_core_u', f'{theirs}.tucker_core.0'
  if not {vector, core} <= names:
    return lambda keys: keys
  cores = [
    source.read(name)
    for name in sorted(names)
    if name.startswith(f'{theirs}.tucker_core.')
  ]
  total = jnp.asarray(np.sum(cores, axis=0), jnp.float32)
  own = np.asarray(tucker.leading_directions(total)[0])
  signs = np.sign(np.sum(own * source.read(vector).reshape(own.shape), -1))
  # Zero before the first step.
  signs = np.where(signs == 0, 1, signs).astype(np.float32)
  return lambda keys: keys * signs.reshape(-1, *(1,) * (keys.ndim - 1))


def _addresses(order: np.ndarray) -> np.ndarray:
  require(
    np.array_equal(np.sort(order), np.arange(len(order))),
    'shuffle_index of a memory layer is no order of its addresses: the '
    'checkpoint is damaged, so fetch it again.',
  )
  return order.astype(np.float32)


Change = Callable[[np.ndarray], np.ndarray]


class _Changed:
  """A source of which some tensors are changed when they are read."""

  def __init__(
    self, source: Source, changes: dict[str, Change], dropped: set[str]
  ):
    self._source, self._changes = source, changes
    self._names = [name for name in source.names() if name not in dropped]

  def names(self) -> Iterable[str]:
    return self._names

  def shape(self, name: str) -> tuple[int, ...]:
    shape = self._source.shape(name)
    if name not in self._changes or name.endswith('shuffle_index'):
      return shape
    # No memory is behind it.
    return self._changes[name](np.broadcast_to(np.float32(0), shape)).shape

  def dtype(self, name: str) -> str:
    if name in self._changes and name.endswith('shuffle_index'):
      return 'float32'
    return self._source.dtype(name)

  def read(self, name: str) -> np.ndarray:
    found = self._source.read(name)
    return self._changes[name](found) if name in self._changes else found
