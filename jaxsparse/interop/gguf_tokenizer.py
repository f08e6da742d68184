# SPDX-License-Identifier: Apache-2.0
"""A GGUF file's metadata to a tokenizer's files, as Hugging Face has them."""

import json
import pathlib
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, pre_tokenizers

from jaxsparse.config.errors import UserError, require, shown
from jaxsparse.data import tokenizer_roles

TOKENS = 'tokenizer.ggml.tokens'

# Kinds of tokens: such as <|im_start|>, and whole words beside the merges.
_CONTROL, _USER_DEFINED = 3, 4

# How Llama 3 cuts a text before it merges.
_LLAMA_3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
  r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)


def write(metadata: dict[str, Any], folder: pathlib.Path, name: str) -> None:
  """Writes tokenizer.json and what stands beside it; nothing if there is none.

  Args:
    metadata: of the file.
    folder: that gets them.
    name: of the file, for messages.

  Raises:
    UserError: the tokenizer is of a kind that can't be rebuilt.
  """
  if TOKENS not in metadata:
    return
  of = _Metadata(metadata, name)
  kind = of.get('model')
  require(
    kind == 'gpt2',
    f'tokenizer.ggml.model = {shown(kind)} in {name} is a kind of tokenizer '
    'that is not rebuilt: gpt2 is; give the folder of safetensors.',
  )
  try:
    made = _bpe(of)
  except UserError:
    raise
  except Exception as error:  # The library's errors have no kind of their own.
    raise UserError(
      f'the tokenizer in {name} is damaged ({str(error).splitlines()[0]}): '
      'fetch the file again.'
    ) from error
  made.save(str(folder / 'tokenizer.json'))
  config = dict(
    tokenizer_class='PreTrainedTokenizerFast',
    bos_token=of.token('bos'),
    eos_token=of.token('eos'),
    unk_token=of.token('unknown'),
    pad_token=of.token('padding'),
    # As llama.cpp does where nothing is said.
    add_bos_token=of.get('add_bos_token', of.get('pre') in _LLAMA_3_NAMES),
    model_max_length=metadata.get('llama.context_length'),
    clean_up_tokenization_spaces=False,
    chat_template=metadata.get('tokenizer.chat_template'),
  )
  _write(folder / tokenizer_roles.CONFIG, config)
  ends = [of.get(f'{role}_token_id') for role in ('eos', 'eot', 'eom')]
  _write(
    folder / tokenizer_roles.GENERATION,
    dict(eos_token_id=[i for i in ends if i is not None]),
  )


class _Metadata:
  """What the metadata say of the tokenizer."""

  def __init__(self, metadata: dict[str, Any], name: str):
    self._metadata, self.name = metadata, name
    self.tokens: list[str] = metadata[TOKENS]

  def get(self, field: str, default: Any = None) -> Any:
    return self._metadata.get(f'tokenizer.ggml.{field}', default)

  def token(self, role: str) -> str | None:
    i = self.get(f'{role}_token_id')
    is_token = isinstance(i, int) and 0 <= i < len(self.tokens)
    return self.tokens[i] if is_token else None


def _bpe(of: _Metadata) -> tokenizers.Tokenizer:
  """Byte-level byte-pair encoding."""
  pre = of.get('pre')
  require(
    isinstance(pre, str) and pre in _PRE_TOKENIZERS,
    f'tokenizer.ggml.pre = {shown(pre)} in {of.name} cuts texts in a way that '
    f'is not known here: {", ".join(_PRE_TOKENIZERS)} are; give the folder of '
    'safetensors.',
  )
  kinds = of.get('token_type') or [1] * len(of.tokens)
  require(
    len(kinds) == len(of.tokens) == len(set(of.tokens)),
    f'{of.name} must have as many tokenizer.ggml.token_type as tokens, each '
    'token once: it is damaged, so fetch it again.',
  )
  merges = [tuple(x.split(' ', 1)) for x in of.get('merges') or ()]
  made = tokenizers.Tokenizer(
    tokenizers.models.BPE(
      {token: i for i, token in enumerate(of.tokens)},
      merges,
      ignore_merges=pre in _LLAMA_3_NAMES,
    )
  )
  made.pre_tokenizer = _PRE_TOKENIZERS[pre]()
  made.decoder = tokenizers.decoders.ByteLevel()
  for token, kind in zip(of.tokens, kinds, strict=True):
    if kind in (_CONTROL, _USER_DEFINED):
      is_special = kind == _CONTROL
      added = AddedToken(token, special=is_special, normalized=False)
      made.add_tokens([added])
  return made


def _digits() -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), _gpt2()]
  )


def _gpt2() -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _llama3() -> pre_tokenizers.PreTokenizer:
  return pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(Regex(_LLAMA_3), 'isolated'),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
  )


_LLAMA_3_NAMES = ('llama-bpe', 'llama3', 'llama-v3')
_PRE_TOKENIZERS = {
  'gpt-2': _gpt2,
  'smollm': _digits,
  **dict.fromkeys(_LLAMA_3_NAMES, _llama3),
}


def _write(path: pathlib.Path, content: dict[str, Any]) -> None:
  given = {name: value for name, value in content.items() if value is not None}
  path.write_text(json.dumps(given, indent=2, ensure_ascii=False) + '\n')
