# SPDX-License-Identifier: Apache-2.0
"""Prompts to tokens and tokens to the names that answers give them."""

import codecs
import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from msgspec import Raw

from jaxsparse.inference.text import encode_prompt
from jaxsparse.serving import options
from jaxsparse.serving.errors import wrong
from jaxsparse.serving.protocol import decode

# By which answers name the token between documents, which has no text.
BOUNDARY = '<|endoftext|>'


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What one or several choices continue."""

  tokens: tuple[int, ...]
  # None if it was given by tokens.
  given_text: str | None
  # What stands before it, uint8 [S, S, 3].
  picture: np.ndarray | None = None

  def text(self, tokenizer: Any) -> str:
    """As a client sees it."""
    if self.given_text is not None:
      return self.given_text
    return tokenizer.decode_bytes(self.tokens).decode('utf-8', 'replace')


Given = str | list[str | int | list[int]] | None


def read(
  raw: Raw,
  tokenizer: Any,
  *,
  vocab_size: int,
  limit: int,
  has_boundary: bool = True,
) -> list[Prompt]:
  """The prompts of a request for completions.

  Args:
    raw: a string, strings, ids or lists of ids; null begins a document.
    tokenizer: of the model.
    vocab_size: ids are below it.
    limit: tokens that fit.
    has_boundary: whether a string begins a document. Ids are taken as they are.

  Raises:
    ApiError: it is none of these, too many, or one is too long.
  """
  content = bytes(raw)
  # Millions of ids would take long to read, with all else waiting.
  is_ids = re.match(rb'[\[\s]+-?\d', content)
  most = options.MOST_PROMPTS * limit
  if is_ids and (num_commas := content.count(b',')) >= most:
    raise options.too_long(num_commas + 1, limit, 'prompt')
  given: Given = decode(content, Given, 'prompt')
  if given is None or isinstance(given, str):
    parts: Sequence[Any] = [given or '']
  elif given and isinstance(given[0], int):
    parts = [given]
  else:
    parts = given
  if not 1 <= len(parts) <= options.MOST_PROMPTS:
    raise wrong(
      'prompt',
      f'prompt must hold 1 to {options.MOST_PROMPTS} prompts, got '
      f'{len(parts)}.',
    )
  kind = type(parts[0])
  if any(type(part) is not kind for part in parts):
    raise wrong('prompt', 'prompt must be all strings or all ids of tokens.')
  if kind is str:
    return [encoded(p, tokenizer, limit, has_boundary) for p in parts]
  return [_of_ids(part, vocab_size, limit) for part in parts]


def encoded(
  text: str,
  tokenizer: Any,
  limit: int,
  has_boundary: bool = True,
  name: str = 'prompt',
) -> Prompt:
  """The prompt of a text."""
  if has_boundary:
    tokens = encode_prompt(tokenizer, text)
  else:
    tokens = tokenizer.encode(text)
  if len(tokens) > limit:
    raise options.too_long(len(tokens), limit, name)
  if not len(tokens):
    raise wrong(name, f'{name} must have at least one token.')
  return Prompt(tuple(tokens.tolist()), text)


def _of_ids(ids: list[Any], vocab_size: int, limit: int) -> Prompt:
  if not ids:
    raise wrong('prompt', 'prompt must have at least one token.')
  if len(ids) > limit:
    raise options.too_long(len(ids), limit, 'prompt')
  if any(type(i) is not int for i in ids):
    raise wrong('prompt', 'prompt must be all strings or all ids of tokens.')
  for extreme in (min(ids), max(ids)):
    options.in_vocabulary('prompt', extreme, vocab_size)
  return Prompt(tuple(ids), None)


class TokenNames:
  """What stands for a token in an answer: its text where it has one.

  Bytes that are no UTF-8 alone are named one by one, as U+FFFD would stand for
  half of a byte vocabulary.
  """

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer
    self._known: dict[int, str] = {}
    # Of tokens that have no text.
    self._silent = {tokenizer.boundary_id: BOUNDARY}
    self._silent |= {i: text for text, i in tokenizer.markers.items()}

  def __call__(self, token: int) -> str:
    if (name := self._known.get(token)) is None:
      name = self._known[token] = self._name(token)
    return name

  def bytes_of(self, token: int) -> bytes:
    return self._tokenizer.decode_bytes([token])

  def _name(self, token: int) -> str:
    content = self.bytes_of(token)
    if not content:
      return self._silent.get(token, f'<|{token}|>')
    try:
      return content.decode()
    except UnicodeDecodeError:
      return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in content)


def offsets(tokenizer: Any, tokens: Iterable[int], text: str) -> list[int]:
  """Characters of the text before each of its tokens."""
  decoder = codecs.getincrementaldecoder('utf-8')('replace')
  found, length = [], 0
  for token in tokens:
    found.append(length)
    length += len(decoder.decode(tokenizer.decode_bytes([token])))
  # Some vocabularies put a space before the first word.
  surplus = length + len(decoder.decode(b'', final=True)) - len(text)
  return [max(0, begin - surplus) for begin in found]
