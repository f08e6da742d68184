# SPDX-License-Identifier: Apache-2.0
"""A template that turns a chat into a prompt, in a sandbox.

A template comes with a model, from whoever made it: it must not run code.
"""

import functools
import pathlib
import secrets
from collections.abc import Iterable
from typing import Any, NoReturn

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxsparse.config.errors import UserError
from jaxsparse.data import tokenizer_roles
from jaxsparse.data.spelling import split_at
from jaxsparse.data.tokenizer import Tokenizer
from jaxsparse.serving.errors import ApiError, wrong
from jaxsparse.serving.protocol import ContentPart, Message, is_set

ROLES = ('system', 'developer', 'user', 'assistant')

_MOST_MESSAGES = 1_000


class _Refusal(Exception):
  """A template's own complaint about the messages."""


def _refuse(message: str) -> NoReturn:
  raise _Refusal(message)


class ChatTemplate:
  """Renders messages as a model was trained to read them."""

  def __init__(self, source: str, name: str = 'the chat template'):
    """Compiles the template.

    Raises:
      UserError: it is no template of Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=['jinja2.ext.loopcontrols'],
    )
    environment.globals['raise_exception'] = _refuse
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateError as error:
      raise UserError(
        f'{name} is no template of Jinja ({error}): give another.'
      ) from error
    self.source = source
    # No message can hold these: for the end of a turn where no text stands for
    # it, and for a place in a message where a marker may not go on.
    self._end, self._break = (secrets.token_hex(16) for _ in range(2))

  @classmethod
  def read(cls, path: str) -> 'ChatTemplate':
    """The template in a file.

    Raises:
      UserError: it can't be read, or is none.
    """
    try:
      source = pathlib.Path(path).expanduser().read_text('utf-8')
    except (OSError, ValueError, RuntimeError) as error:
      raise UserError(
        f"--chat-template={path} can't be read ({error}): name a file with a "
        'template of Jinja.'
      ) from error
    return cls(source, f'--chat-template={path}')

  @classmethod
  def of_workdir(cls, workdir: str) -> 'ChatTemplate | None':
    """The template that a model was published with, if there is one.

    Raises:
      UserError: it can't be read, or is none.
    """
    source = tokenizer_roles.chat_template(workdir)
    if source is None:
      return None
    return cls(source, f'the chat template in {workdir!r}')

  def tokens(
    self, messages: list[dict[str, str]], tokenizer: Tokenizer
  ) -> np.ndarray:
    """The prompt of a chat, up to where the assistant speaks: int32 [T].

    Markers that the template writes become their tokens; in a message they are
    text like any other. A prompt begins as a document does, unless the template
    begins it with a marker of its own.

    Args:
      messages: dicts of 'role' and 'content'.
      tokenizer: of the model.

    Raises:
      ApiError: the template refuses them or fails.
    """
    markers = tokenizer.markers
    texts = {i: text for text, i in markers.items()}
    safe = [
      message | {'content': self._broken(message['content'], tuple(markers))}
      for message in messages
    ]
    end_id = tokenizer.stop_ids[0]
    text = self._render(
      messages=safe,
      add_generation_prompt=True,
      tools=None,
      documents=None,
      bos_token=texts.get(tokenizer.begin_id, ''),
      eos_token=texts.get(end_id, self._end),
    )
    ids: list[int] = []
    for i, turn in enumerate(text.split(self._end)):
      ids += [end_id] * (i > 0)
      ids += [token for part in self._parts(turn, tokenizer) for token in part]
    if not ids or ids[0] not in texts:
      ids.insert(0, tokenizer.begin_id)
    return np.array(ids, np.int32)

  def _render(self, **fields: Any) -> str:
    try:
      return self._template.render(**fields)
    except _Refusal as error:
      raise wrong('messages', f'The chat template refuses: {error}.') from error
    except (jinja2.TemplateError, ArithmeticError, LookupError) as error:
      raise _failed(error) from error
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
      raise _failed(error) from error

  def _broken(self, content: str, markers: tuple[str, ...]) -> str:
    """A message in which no marker is whole, nor becomes so beside others.

    What breaks it stands within the message's words, as templates take space
    off its ends.
    """
    parts = (
      part[0] + self._break + part[1:] if part in markers else part
      for part in split_at(markers, content)
    )
    content = ''.join(parts)
    if content.startswith(_rests(markers)):
      content = self._break + content
    if content.endswith(_beginnings(markers)):
      content += self._break
    return content

  def _parts(self, text: str, tokenizer: Tokenizer) -> Iterable[list[int]]:
    if self._break not in text:
      yield tokenizer.encode(text, has_markers=True).tolist()
      return
    markers = tokenizer.markers
    for part in split_at(markers, text):
      plain = part.replace(self._break, '')
      yield tokenizer.encode(plain, has_markers=part in markers).tolist()


@functools.lru_cache(4)
def _beginnings(markers: tuple[str, ...]) -> tuple[str, ...]:
  return tuple({m[:i] for m in markers for i in range(1, len(m))})


@functools.lru_cache(4)
def _rests(markers: tuple[str, ...]) -> tuple[str, ...]:
  return tuple({m[i:] for m in markers for i in range(1, len(m))})


def _failed(error: Exception) -> ApiError:
  return wrong(
    'messages',
    f'The chat template fails on these messages ({type(error).__name__}).',
  )


def require(template: ChatTemplate | None) -> ChatTemplate:
  if template is None:
    raise ApiError(
      400,
      'chat_template_missing',
      'This model has no chat template: send a prompt to /v1/completions, or '
      'start the server with --chat-template=FILE.',
      'messages',
    )
  return template


def plain(messages: list[Message]) -> list[dict[str, str]]:
  """Messages as templates take them: of text alone.

  Raises:
    ApiError: there is something else in them.
  """
  if not 1 <= len(messages) <= _MOST_MESSAGES:
    raise wrong(
      'messages',
      f'messages must be 1 to {_MOST_MESSAGES:,}, got {len(messages)}.',
    )
  return [_plain(message, i) for i, message in enumerate(messages)]


def _plain(message: Message, i: int) -> dict[str, Any]:
  where = f'messages[{i}]'
  if message.role not in ROLES:
    raise wrong(
      f'{where}.role',
      f'{where}.role must be one of {", ".join(ROLES)}, got '
      f'{message.role[:40]!r}.',
    )
  for field in ('tool_calls', 'function_call', 'audio'):
    if is_set(getattr(message, field)):
      raise wrong(f'{where}.{field}', f'{where}.{field} is not served here.')
  content = message.content
  if isinstance(content, list):
    content = ''.join(_text_of(part, where) for part in content)
  if content is None:
    raise wrong(f'{where}.content', f'{where}.content must be a text.')
  # What newer clients call developer, templates know as system.
  role = 'system' if message.role == 'developer' else message.role
  return {'role': role, 'content': content}


def _text_of(part: ContentPart, where: str) -> str:
  if part.type != 'text' or part.text is None:
    raise wrong(
      f'{where}.content',
      f'{where}.content must be text: this model takes nothing else, got a '
      f'part of type {part.type[:40]!r}.',
    )
  return part.text
