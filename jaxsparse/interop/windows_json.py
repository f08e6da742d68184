# SPDX-License-Identifier: Apache-2.0
"""Which blocks see a window only, as config.json says it.

A window of W positions holds the token itself there as here (transformers 5:
key > query - W).
"""

from typing import Any

from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import require, shown
from jaxsparse.interop.config_json import Fields

_KINDS = dict(full_attention='global', sliding_attention='local')


def read_one(fields: Fields, num_layers: int) -> dict[str, Any]:
  """The same in all blocks: Mistral, Mixtral.

  Raises:
    UserError: the field isn't there: what then holds has changed with versions.
  """
  fields.require_named('sliding_window')
  window = fields.take('sliding_window', int, 0)
  return _pattern(['local' if window else 'global'] * num_layers, window)


def read_by_layer(fields: Fields, num_layers: int) -> dict[str, Any]:
  """By blocks: Qwen2, Qwen3.

  Raises:
    UserError: the fields do not fit each other.
  """
  is_used = fields.take('use_sliding_window', bool, False)
  named = fields.take('layer_types', list, None)
  if not is_used:
    fields.skip('sliding_window', 'max_window_layers')
    require(
      named is None or named == ['full_attention'] * num_layers,
      f'layer_types = {shown(named)} in config.json does not fit '
      'use_sliding_window = False.',
    )
    return {}
  window = fields.take('sliding_window', int)
  first = fields.take(
    'max_window_layers', int, 0 if named else num_layers, least=0
  )
  kinds = ['local' if i >= first else 'global' for i in range(num_layers)]
  if named is not None:
    require(
      # In a list, as what a file holds may not be hashable.
      all(kind in [*_KINDS] for kind in named) and len(named) == num_layers,
      f'layer_types in config.json must hold {" or ".join(_KINDS)} for each of '
      f'the {num_layers} layers, got {shown(named)}.',
    )
    kinds = [_KINDS[kind] for kind in named]
  return _pattern(kinds, window)


def _pattern(kinds: list[str], window: int) -> dict[str, Any]:
  """The shortest pattern that repeats to these kinds."""
  if 'local' not in kinds:
    return {}
  length = next(
    n
    for n in range(1, len(kinds) + 1)
    if all(kind == kinds[i % n] for i, kind in enumerate(kinds))
  )
  return dict(attention_pattern=tuple(kinds[:length]), window=window)


def write_one(config: ModelConfig) -> dict[str, Any]:
  """What `read_one` reads, if all blocks are alike."""
  is_local = set(config.attention_blocks) == {'local'}
  return dict(sliding_window=config.window if is_local else None)


def write_by_layer(config: ModelConfig) -> dict[str, Any]:
  """What `read_by_layer` reads."""
  kinds = config.attention_blocks
  is_used = 'local' in kinds
  names = {ours: theirs for theirs, ours in _KINDS.items()}
  return dict(
    use_sliding_window=is_used,
    sliding_window=config.window if is_used else None,
    max_window_layers=kinds.index('local') if is_used else len(kinds),
    layer_types=[names.get(kind, '') for kind in kinds],
  )
