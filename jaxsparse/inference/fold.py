# SPDX-License-Identifier: Apache-2.0
"""A trained model's parameters as decoding wants them, made once at load.

A decode step of a few sequences takes as long as the number of its operations,
most of which depend on parameters alone or can be joined by them. The modules
read what is made of them here in place of what they declare: a norm without a
gain, one matrix of all heads. Numbers are the same but for rounding, and so are
bytes.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config import ModelConfig
from jaxsparse.config.model import block_name
from jaxsparse.nn.memory import key_scores

# All that reads a norm's output within a block, with the dimension of each that
# is the model's width. Depth-wise convolutions commute with a gain.
_READERS: dict[str, dict[tuple[str, ...], int]] = dict(
  attention_norm={
    ('attention', 'query'): 0,
    ('attention', 'key'): 0,
    ('attention', 'value'): 0,
    ('attention', 'dcmha', 'hidden'): 0,
    ('attention', 'dcmha', 'gate'): 0,
    ('attention', 'sparse', 'gate'): 0,
    ('attention', 'sparse', 'coverage'): 0,
    ('attention', 'sparse', 'router_query'): 0,
    ('attention', 'sparse', 'router_weight'): 0,
    ('attention', 'sparse', 'router_key'): 0,
  },
  mlp_norm={
    ('mlp', 'gate'): 0,
    ('mlp', 'up'): 0,
    ('moe', 'router'): 0,
    ('moe', 'gate'): 1,
    ('moe', 'up'): 1,
    ('moe', 'shared', 'gate'): 0,
    ('moe', 'shared', 'up'): 0,
    ('memory', 'query'): 0,
    ('memory', 'gate'): 0,
    ('memory', 'pre_value_map'): 0,
  },
)
# All that attention has beside its own matrices.
_KNOWN_PARTS = {'dcmha', 'sparse', 'query_norm', 'key_norm'}
# Matrices that read the same, with the name of the one that they become and the
# dimension along which they stand side by side; of biases it is one less.
_MERGED = (
  (('attention',), ('query', 'key', 'value'), 'heads', 1),
  (('mlp',), ('gate', 'up'), 'gate_up', 1),
  (('moe', 'shared'), ('gate', 'up'), 'gate_up', 1),
)


def fold_for_decode(config: ModelConfig, params: dict) -> dict:
  """The same model's parameters, of fewer and larger arrays.

  Gains of RMSNorms are in the matrices that follow, where all of these can take
  them; queries, keys and values are one product, and so are gates and inputs of
  MLPs. A quantized or adapted matrix stays as it is, and a gain before it. For
  one device: a mesh could not split what is merged.

  Args:
    config: of the model.
    params: its parameters, best as they were trained: who casts first rounds
      twice. They are taken out of this tree, which is of no use afterwards, so
      that no two copies of all of them are there.
  """
  names = [block_name(i) for i in range(config.num_layers)]
  folded = {name: params.pop(name) for name in set(params) - set(names)}
  for name in names:
    block = _own(params.pop(name))
    if config.norm == 'rms' and config.norm_placement == 'pre':
      _fold_gains(config, block)
    for place, parts, whole, axis in _MERGED:
      if layer := _at(block, place):
        _merge(layer, parts, whole, axis)
    if 'memory' in block:
      _fold_keys(config, block['memory'])
    folded[name] = block
  if config.norm == 'rms' and _is_array(folded.get('output')):
    folded['output'] = _with_gain(
      folded['output'], folded['final_norm']['scale'], 1
    )
    folded['final_norm'] = dict(scale=None)
  return folded


def _own(tree: Any) -> Any:
  """The dicts of a tree, to be changed."""
  if not isinstance(tree, dict):
    return tree
  return {name: _own(tree.pop(name)) for name in list(tree)}


def _at(tree: dict, place: Sequence[str]) -> Any:
  """What is in a place; None for nothing."""
  for name in place:
    if name not in tree:
      return None
    tree = tree[name]
  return tree


def _is_array(x: Any) -> bool:
  """Whether it is no quantized or adapted matrix."""
  return isinstance(x, jax.Array | np.ndarray)


def _fold_gains(config: ModelConfig, block: dict) -> None:
  for norm, readers in _READERS.items():
    found = {
      place: axis
      for place, axis in readers.items()
      if _at(block, place) is not None
    }
    if _is_read_otherwise(config, block, norm):
      continue
    if not all(_is_array(_at(block, place)) for place in found):
      continue
    for (*owners, name), axis in found.items():
      layer = _at(block, owners)
      layer[name] = _with_gain(layer[name], block[norm]['scale'], axis)
    block[norm] = dict(scale=None)


def _is_read_otherwise(config: ModelConfig, block: dict, norm: str) -> bool:
  """Whether layers read a norm's output by more than known matrices."""
  if norm == 'attention_norm':
    # A kind of attention of somebody's own has parameters by its name.
    parts = {n for n, x in block['attention'].items() if isinstance(x, dict)}
    return bool(parts - _KNOWN_PARTS)
  memory = config.memory
  meets_rows = memory and memory.pre_value_dim and not memory.pre_value_map
  return ('memory' in block and bool(meets_rows)) or any(
    name in block for name in config.beside_mlp
  )


@functools.partial(jax.jit, static_argnums=2)
def _with_gain(matrix: jax.Array, gain: jax.Array, axis: int) -> jax.Array:
  shape = [1] * matrix.ndim
  shape[axis] = -1
  wide = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
  return (wide * gain.reshape(shape)).astype(matrix.dtype)


def _merge(layer: dict, parts: Sequence[str], whole: str, axis: int) -> None:
  if not all(_is_array(layer.get(name)) for name in parts):
    return
  for ending, along in (('', axis), ('_bias', axis - 1)):
    names = [f'{name}{ending}' for name in parts]
    if names[0] in layer:
      layer[f'{whole}{ending}'] = _side_by_side(
        [layer.pop(name) for name in names], along
      )


@functools.partial(jax.jit, static_argnums=1)
def _side_by_side(arrays: list[jax.Array], axis: int) -> jax.Array:
  return jnp.concatenate(arrays, axis)


def _fold_keys(config: ModelConfig, layer: dict) -> None:
  assert config.memory is not None
  memory = config.memory.for_width(config.model_dim)
  gains = [layer.get(name) for name in ('key_scale', 'query_scale')]
  layer['keys'] = _folded_keys(
    layer['keys'], *gains, layer.get('cores'), memory
  )
  layer |= {
    name: None for name in ('key_scale', 'query_scale') if name in layer
  }


_folded_keys = jax.jit(key_scores.folded, static_argnums=4)
