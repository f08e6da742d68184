# SPDX-License-Identifier: Apache-2.0
"""A folder as the Hugging Face hub has it: config.json and safetensors."""

import pathlib
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import UserError, did_you_mean, require, shown
from jaxsparse.interop import tokenizers_in
from jaxsparse.interop.config_json import Fields
from jaxsparse.interop.families import (
  dcformer,
  gpt_neox,
  llama,
  mixtral,
  olmo2,
)
from jaxsparse.interop.importing import Opened
from jaxsparse.interop.source import SafetensorsSource, Source, Without

# Those that there is a way out to, and those that are programs of their own.
FAMILIES = (llama, mixtral, olmo2, gpt_neox)
READ_ONLY = (dcformer,)

# Positions where a config.json names none.
_LENGTH = 2048

# What keeps well-known models out.
_KNOWN_REASONS = dict(
  gemma='scaled embeddings and gains of 1 + weight',
  gemma2='scaled embeddings, capped logits and norms on both sides',
  gemma3='scaled embeddings and norms on both sides',
  gemma3_text='scaled embeddings and norms on both sides',
  deepseek_v2='latent attention and grouped experts',
  deepseek_v3='latent attention and grouped experts',
  olmo='norms without gains',
  gpt2='learned positions',
  phi3='fused projections and scaled rotary embeddings',
)


def open_folder(folder: pathlib.Path, content: dict[str, Any]) -> Opened:
  """What a folder holds whose config.json has `content`.

  Raises:
    UserError: it is damaged, or of a model that we do not have.
  """
  family = _family(content)
  config = to_config(family, content)
  source = _without_surplus(SafetensorsSource(folder), family, config)
  notes: list[str] = []
  if hasattr(family, 'prepare'):
    source, config, notes = family.prepare(source, config)
  return Opened(
    source=source,
    layout=family.layout(config, content['model_type']),
    config=config,
    length=Fields(content).take(
      getattr(family, 'LENGTH', 'max_position_embeddings'), int, _LENGTH
    ),
    notes=tuple(notes),
    family=content['model_type'],
    origin=dict(
      format='Hugging Face',
      family=content['model_type'],
      folder=folder.name,
    ),
    write_tokenizer=lambda workdir: tokenizers_in.copy_tokenizer(
      folder, workdir, config.vocab_size
    ),
  )


def _family(content: dict[str, Any]) -> ModuleType:
  kind = content.get('model_type')
  families = (*FAMILIES, *READ_ONLY)
  known = [name for family in families for name in family.MODEL_TYPES]
  for family in families:
    if isinstance(kind, str) and kind in family.MODEL_TYPES:
      break
  else:
    why = _KNOWN_REASONS.get(kind) if isinstance(kind, str) else None
    raise UserError(
      f'model_type = {shown(kind)} in config.json is a model that jaxsparse '
      + (
        f'does not have, as it lacks {why}'
        if why
        else f'does not know{did_you_mean(str(kind), known)}'
      )
      + f': it reads {", ".join(known)}.'
    )
  require(
    not content.get('quantization_config'),
    'quantization_config in config.json says that the weights are quantized: '
    'give the checkpoint that is not.',
  )
  require(
    not content.get('auto_map') or hasattr(family, 'IS_PROGRAM'),
    'auto_map in config.json says that the model is a program beside it, which '
    f'may be another than {kind} and is not run here.',
  )
  return family


def to_config(family: ModuleType, content: dict[str, Any]) -> ModelConfig:
  """`family.to_config`; what `ModelConfig` refuses is of the config.json.

  Raises:
    UserError: a field is missing or not valid, or says what we do not have.
  """
  try:
    return family.to_config(content)
  except UserError as error:
    if 'config.json' in str(error) or 'rope_' in str(error):
      raise
    raise UserError(
      f'config.json describes a model that can not be: {error}'
    ) from error


def _without_surplus(
  source: Source, family: ModuleType, config: ModelConfig
) -> Source:
  """Without tensors that are no weights, and a copy of the tied table."""
  found, head, table = set(source.names()), family.HEAD, family.EMBEDDING
  has_copy = config.tie_embeddings and {head, table} <= found
  if has_copy:
    require(
      source.shape(head) == source.shape(table)
      and _equal(source.read, head, table),
      f'{head} differs from {table}, though tie_word_embeddings in config.json '
      'says that they are one: set it to false there if the head is right.',
    )
  unused = re.compile(family.UNUSED or r'(?!)')
  return Without(
    source,
    lambda name: bool(unused.fullmatch(name)) or (has_copy and name == head),
  )


def _equal(read: Callable[[str], np.ndarray], one: str, other: str) -> bool:
  return np.array_equal(read(one), read(other))
