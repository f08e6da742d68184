# SPDX-License-Identifier: Apache-2.0
"""Generated text: written once, beside the tokenizer of its words."""

import json
import os
import pathlib
from collections.abc import Callable, Iterable

import tokenizers

from jaxsparse.config.errors import UserError

_TOKENIZER_NAME = 'tokenizer.json'


def word_tokenizer(words: Iterable[str], pattern: str) -> tokenizers.Tokenizer:
  """A tokenizer of whole words, which the pattern separates."""
  words = ['<|endoftext|>', '<unk>', *words]
  vocabulary = {word: i for i, word in enumerate(words)}
  if len(vocabulary) < len(words):
    raise AssertionError('two words of a generated text are the same')
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token='<unk>')
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
    tokenizers.Regex(pattern), 'isolated'
  )
  tokenizer.decoder = tokenizers.decoders.Fuse()
  tokenizer.add_special_tokens(['<|endoftext|>'])
  return tokenizer


def write_once(
  record: pathlib.Path,
  identity: dict,
  tokenizer: tokenizers.Tokenizer,
  write_text: Callable[[pathlib.Path], float],
) -> dict:
  """Writes text and tokenizer beside the record, unless they are there already.

  Args:
    record: of what is there; its folder is made where it is missing.
    identity: of the text, for JSON.
    tokenizer: of the text.
    write_text: writes `*.txt` into a folder, of which the last by their names
      are to validate, and returns the share of bytes that they have.

  Returns:
    The fields of a `DataConfig` that name text, split and tokenizer.

  Raises:
    UserError: the folder can't be written.
  """
  folder = record.parent
  try:
    made = json.loads(record.read_text()) if record.exists() else {}
    if made.get('identity') != identity:
      folder.mkdir(parents=True, exist_ok=True)
      made = dict(identity=identity, validation_fraction=write_text(folder))
      write_whole(folder / _TOKENIZER_NAME, tokenizer.to_str())
      # Last, so that a folder that a kill left half written is made again.
      write_whole(record, json.dumps(made))
  except OSError as error:
    raise UserError(
      f"{str(folder)!r} can't be written ({error.strerror}): give another "
      '--workdir or make room.'
    ) from error
  return dict(
    text=str(folder / '*.txt'),
    # Files come in the order of their names, and the last are to validate.
    split='bytes',
    validation_fraction=made['validation_fraction'],
    test_fraction=0.0,
    tokenizer=str(folder / _TOKENIZER_NAME),
  )


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes all of a file at once: two comparisons may share a folder."""
  new = path.with_name(f'{path.name}.{os.getpid()}')
  new.write_text(text, encoding='utf-8')
  new.replace(path)
