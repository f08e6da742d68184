# SPDX-License-Identifier: Apache-2.0
"""How published vocabularies write bytes, and where a text spells a token."""

import functools
import json
import re
from collections.abc import Iterable

import tokenizers


def split_at(markers: Iterable[str], text: str) -> list[str]:
  """The text in parts, of which those that are markers stand alone."""
  # A marker may begin with another one.
  longest_first = sorted(markers, key=len, reverse=True)
  pattern = '|'.join(map(re.escape, longest_first))
  parts = re.split(f'({pattern})', text) if pattern else [text]
  return [part for part in parts if part]


@functools.cache
def byte_alphabet() -> dict[str, bytes]:
  """The character by which GPT-2's byte-level vocabularies write each byte.

  Printable bytes of Latin-1 stand for themselves; the others take the
  characters from U+0100 on, in their order.
  """
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  alphabet = {chr(byte): bytes([byte]) for byte in printable}
  return alphabet | {
    chr(256 + i): bytes([byte]) for i, byte in enumerate(others)
  }


def byte_level_bytes(token: str) -> bytes:
  alphabet = byte_alphabet()
  return b''.join(alphabet.get(char) or char.encode() for char in token)


def piece_bytes(piece: str) -> bytes:
  """Bytes of a SentencePiece piece, of which some stand for one byte."""
  if byte := re.fullmatch('<0x([0-9A-F]{2})>', piece):
    return bytes([int(byte[1], 16)])
  return piece.replace('\u2581', ' ').encode()


def unknown_id(tokenizer: tokenizers.Tokenizer) -> int | None:
  """Of the token that stands for all that is unknown."""
  model = json.loads(tokenizer.to_str())['model']
  # Unigram has its number, others its text.
  if model.get('unk_token') is None:
    return model.get('unk_id')
  return tokenizer.token_to_id(model['unk_token'])


def parts_of(
  tokenizer: tokenizers.Tokenizer, token: int | None, text: str
) -> list[str]:
  """Parts of a text that become one token."""
  found = tokenizer.encode(text, add_special_tokens=False)
  return [
    text[slice(*place)].strip()
    for i, place in zip(found.ids, found.offsets, strict=True)
    if i == token
  ]


def sound(text: str) -> str:
  """The text, with a question mark for what UTF-8 has no bytes for."""
  return text.encode('utf-8', 'replace').decode()
