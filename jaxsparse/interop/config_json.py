# SPDX-License-Identifier: Apache-2.0
"""Fields of a config.json of others, each read once and none passed over."""

import json
import math
import pathlib
from typing import Any

from jaxsparse.config.errors import UserError, require, shown

# What does not change the function that a model is when it is used.
_HARMLESS = frozenset(
  {
    '_name_or_path', 'architectures', 'attention_dropout',
    'attention_probs_dropout_prob', 'attn_pdrop', 'bos_token_id',
    'classifier_dropout', 'dtype', 'embd_pdrop', 'eos_token_id',
    'hidden_dropout', 'hidden_dropout_prob', 'id2label', 'initializer_range',
    'is_decoder', 'is_llama_config', 'label2id', 'max_position_embeddings',
    'max_sequence_length', 'model_type', 'output_attentions',
    'output_hidden_states', 'output_router_logits', 'pad_token_id',
    'pretraining_tp', 'resid_pdrop', 'return_dict', 'router_aux_loss_coef',
    'router_jitter_noise', 'torch_dtype', 'transformers.js_config',
    'transformers_version', 'unk_token_id', 'use_cache', 'use_return_dict',
  }
)  # fmt: skip
_KINDS = {int: 'a whole number', float: 'a number', bool: 'true or false',
          str: 'text', list: 'a list', dict: 'an object'}  # fmt: skip
_REQUIRED = object()


class Fields:
  """The fields of a config.json; `finish` refuses those that nobody took."""

  def __init__(self, content: dict[str, Any], name: str = 'config.json'):
    self._content, self._name = content, name
    self._taken: set[str] = set()

  def take(
    self, name: str, kind: type, default: Any = _REQUIRED, least: int = 1
  ) -> Any:
    """The value of a field; null stands for a missing one.

    Args:
      name: of the field.
      kind: int, float, bool, str, list or dict.
      default: where it is missing; without one it must be there.
      least: value of a whole number.

    Raises:
      UserError: it is missing, or not of this kind.
    """
    self._taken.add(name)
    value = self._content.get(name)
    if value is None:
      require(
        default is not _REQUIRED,
        f'{self._name} lacks {name}, {_KINDS[kind]} without which the model is '
        'not known.',
      )
      return default
    if kind is float and type(value) is int:
      value = float(min(max(value, -1e300), 1e300))
    is_good = type(value) is kind and (
      kind is not float or math.isfinite(value)
    )
    require(
      is_good and (kind is not int or least <= value < 2**31),
      f'{name} in {self._name} must be {_KINDS[kind]}'
      f'{f" of at least {least}" if kind is int else ""}, got {shown(value)}.',
    )
    return value

  def require_named(self, name: str) -> None:
    """Refuses a config.json that has no such field, not even a null.

    Raises:
      UserError: it has none.
    """
    require(
      name in self._content,
      f'{self._name} lacks {name}, without which the model is not known.',
    )

  def expect(self, name: str, *values: Any) -> None:
    """Refuses a field with another value; missing it has the first of these.

    Raises:
      UserError: it has one.
    """
    self._taken.add(name)
    value = self._content.get(name)
    require(
      value is None or value in values,
      f'{name} = {shown(value)} in {self._name} changes the function in a way '
      f'that jaxsparse does not have: it reads {" or ".join(map(repr, values))}'
      ' only.',
    )

  def skip(self, *names: str) -> None:
    """Takes fields that mean nothing beside the others."""
    self._taken.update(names)

  def finish(self) -> None:
    """Refuses a field that nobody took and that is not known as harmless.

    Raises:
      UserError: there is one.
    """
    for name, value in self._content.items():
      if value is None or name in self._taken or name in _HARMLESS:
        continue
      raise UserError(
        f'{name} = {shown(value)} in {self._name} is unknown here, and may '
        'change the function of the model: it is not imported without knowing.'
      )


def read(folder: pathlib.Path) -> dict[str, Any]:
  """What the folder's config.json holds.

  Raises:
    UserError: there is none, or it is no JSON object.
  """
  path = folder / 'config.json'
  require(
    path.is_file(),
    f'{str(folder)!r} has no config.json: give the folder of a published '
    'checkpoint.',
  )
  try:
    content = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    raise UserError(
      f'{str(path)!r} is no JSON: it is cut off or damaged, so fetch it again.'
    ) from error
  require(
    isinstance(content, dict),
    f'{str(path)!r} must hold a JSON object, got {shown(content)}.',
  )
  return content
