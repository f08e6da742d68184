# SPDX-License-Identifier: Apache-2.0
"""Chats in files: JSON lines of messages, each with a role and a content.

  {"messages": [{"role": "user", "content": "Who?"},
                {"role": "assistant", "content": "I."}]}

A line may be the list of messages alone, and a file that ends in .json a list
of such lines. That is the form in which OpenAI takes chats for fine-tuning, a
message's `weight` included: an answer of weight 0 is read and not learned.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from jaxsparse.config.errors import UserError, did_you_mean, require, shown
from jaxsparse.data import formats, records, text_files
from jaxsparse.data.chat_template import ROLES

_FIELD = 'messages'
# Of newer clients; templates know it as the other.
_SAME_ROLES = {'developer': 'system'}
_UNKNOWN = ('tool_calls', 'function_call', 'audio')


class Chat(NamedTuple):
  """One chat."""

  # Dicts of 'role' and 'content'.
  messages: tuple[dict[str, str], ...]
  # Indices of the answers that are to be learned.
  learned: tuple[int, ...]
  # Where it is from, such as "line 3 of 'chat.jsonl'".
  place: str

  @property
  def text(self) -> bytes:
    """What is learned, as a yardstick reads it."""
    texts = [self.messages[i]['content'] for i in self.learned]
    return '\n'.join(texts).encode()

  @property
  def identity(self) -> str:
    """The same for the same chat, wherever it is from."""
    return json.dumps([self.messages, self.learned], sort_keys=True)


def read(patterns: str) -> Iterator[Chat]:
  """The chats of the files, in order.

  Args:
    patterns: paths, folders and globs, separated by commas.

  Raises:
    UserError: a pattern names no file, a file can't be read, or a line holds no
      chat with an answer; the sentence names file and line.
  """
  for path in text_files.find(patterns):
    try:
      for place, value in _values(path):
        yield _chat(value, f'{place} of {str(path)!r}')
    except UserError:
      raise
    except Exception as error:  # Stores and packers have errors of their own.
      raise UserError(
        f"{str(path)!r} can't be read ({error}): repair it, or leave it out of "
        'data.messages.'
      ) from error


def _values(path: pathlib.PurePath) -> Iterator[tuple[str, Any]]:
  ending = formats.ending(path)
  # JSON lines are often called so, too.
  if ending == '.json' and (whole := _whole(path)):
    for number, value in enumerate(whole, 1):
      yield f'record {number:,}', value
    return
  with path.open('rb') as raw:
    if ending == '.parquet':
      yield from records.parquet_rows(raw, path, _FIELD, setting='')
    else:
      yield from records.json_lines(raw, path)


def _whole(path: pathlib.PurePath) -> list[Any]:
  """The chats of a file that is one value of JSON; none if it is not."""
  with path.open('rb') as raw:
    try:
      found = json.loads(formats.open_text(raw, path).read())
    except (ValueError, RecursionError):
      return []
  if not isinstance(found, list):
    return [found]
  is_chat = bool(found) and isinstance(found[0], dict) and 'role' in found[0]
  return [found] if is_chat else found


def _chat(value: Any, place: str) -> Chat:
  if isinstance(value, dict):
    if _FIELD not in value:
      raise _bad(
        place,
        f'has no field {_FIELD!r}{did_you_mean(_FIELD, value)} but '
        f'{", ".join(map(str, value)) or "none"}',
      )
    value = value[_FIELD]
  if not isinstance(value, list) or not value:
    raise _bad(place, f'holds {shown(value)} where a list of messages belongs')
  messages, learned = [], []
  has_answers = False
  for i, message in enumerate(value):
    role, content = _message(message, f'{place}: messages[{i}]')
    messages.append({'role': role, 'content': content})
    has_answers |= role == 'assistant'
    if role == 'assistant' and message.get('weight') not in (0, 0.0):
      learned.append(i)
  if not has_answers:
    raise _bad(place, 'has no answer to learn, no message of role assistant')
  require(
    bool(learned),
    f'{place} has no answer to learn, as all of its answers have the weight 0: '
    'give one the weight 1, or leave it out.',
  )
  return Chat(tuple(messages), tuple(learned), place)


def _message(message: Any, where: str) -> tuple[str, str]:
  if not isinstance(message, dict):
    raise _bad(where, f'is {shown(message)}, no object')
  role = message.get('role')
  if role not in ROLES:
    raise _bad(
      where, f'has the role {shown(role)}, which is none of {", ".join(ROLES)}'
    )
  if called := [name for name in _UNKNOWN if message.get(name)]:
    raise _bad(where, f'has {called[0]}, which is not learned')
  content = message.get('content')
  if isinstance(content, list):
    parts = [part.get('text') for part in content if _is_text(part)]
    content = ''.join(parts) if len(parts) == len(content) else content
  if not isinstance(content, str):
    raise _bad(where, f'has the content {shown(content)}, no text')
  # None is what a parquet file has where a message has no weight.
  if (weight := message.get('weight')) not in (None, 0, 1):
    raise _bad(where, f'has the weight {shown(weight)}, which is not 0 or 1')
  try:
    content.encode()
  except UnicodeEncodeError as error:
    half = content[error.start]
    raise _bad(where, f'holds half a character ({half!r})') from error
  return _SAME_ROLES.get(role, role), content


def _is_text(part: Any) -> bool:
  return (
    isinstance(part, dict)
    and part.get('type') == 'text'
    and isinstance(part.get('text'), str)
  )


def _bad(place: str, what: str) -> UserError:
  return UserError(
    f'{place} {what}: give chats as data.messages has them, lines such as '
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", '
    '"content": "..."}]}, or leave it out.'
  )
