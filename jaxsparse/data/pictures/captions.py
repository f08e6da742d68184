# SPDX-License-Identifier: Apache-2.0
"""What a record says of a picture: its captions, its group, wrong captions."""

from collections.abc import Sequence
from typing import Any

from jaxsparse.config.errors import UserError, shown

_FORM = '{"image": "NAME.png", "caption": "TEXT"}'
_TEXTS = ('group', 'prompt', 'meaning')


def fields_of(record: Any, place: str) -> dict[str, Any]:
  """The fields of a `Pair` that a JSON object gives.

  Args:
    record: has 'caption' or 'captions', and may have 'group', 'prompt',
      'meaning' and 'distractors'; others are let be.
    place: what errors call it, such as "line 3 of 'captions.jsonl'".

  Raises:
    UserError: it is no such object, or a text is empty.
  """
  if not isinstance(record, dict):
    raise UserError(f'{place} is no JSON object: write {_FORM}.')
  given = [name for name in ('caption', 'captions') if name in record]
  if len(given) != 1:
    which = 'both "caption" and "captions"' if given else 'no "caption"'
    raise UserError(f'{place} has {which}: write {_FORM}.')
  found = record[given[0]]
  captions = _texts(found, given[0], place)
  if not captions:
    raise UserError(
      f'{place} has an empty list of captions: give one, or leave it out.'
    )
  texts = {name: record.get(name) or '' for name in _TEXTS}
  for name, text in texts.items():
    if not isinstance(text, str):
      raise UserError(
        f'{name!r} in {place} must be a string, got {shown(text)}.'
      )
  distractors = _texts(record.get('distractors', []), 'distractors', place)
  return dict(captions=captions, distractors=distractors, **texts)


def _texts(found: Any, name: str, place: str) -> tuple[str, ...]:
  texts = [found] if isinstance(found, str) else found
  if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
    raise UserError(
      f'{name!r} in {place} must be a string, or a list of strings, got '
      f'{shown(found)}.'
    )
  return tuple(checked(text, f'{name!r} in {place}') for text in texts)


def checked(text: str, what: str) -> str:
  """The text without spaces around it.

  Raises:
    UserError: nothing is left, or it is no Unicode.
  """
  text = text.strip()
  if not text:
    raise UserError(f'{what} is empty: write what the picture shows.')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'{what} holds half a character ({text[error.start]!r}): repair it.'
    ) from error
  return text


def require_pairs(pairs: Sequence[Any], where: str) -> None:
  """Refuses a collection without pairs.

  Raises:
    UserError: it is one.
  """
  if not pairs:
    raise UserError(f'data.pairs = {where!r} holds no pairs: {_WANTED}.')


_WANTED = (
  'give a folder with pictures and a captions.jsonl of lines '
  f'{_FORM}, or .tar files with NAME.png beside NAME.txt'
)


def not_found(where: str) -> UserError:
  return UserError(f'data.pairs = {where!r} names no pairs: {_WANTED}.')
