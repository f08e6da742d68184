# SPDX-License-Identifier: Apache-2.0
"""Messages of requests, and the prompts that templates make of them."""

from typing import Any

import numpy as np

from jaxsparse.data.chat_template import ROLES, ChatTemplate, RefusedError
from jaxsparse.data.tokenizer import Tokenizer
from jaxsparse.serving.errors import ApiError, wrong
from jaxsparse.serving.protocol import ContentPart, Message, is_set

_MOST_MESSAGES = 1_000


def tokens(
  template: ChatTemplate,
  messages: list[Message],
  tokenizer: Tokenizer,
  sees: bool = False,
) -> np.ndarray:
  """The prompt of a chat, up to where the assistant speaks: int32 [T].

  Args:
    template: of the model.
    messages: of the chat.
    tokenizer: of the model.
    sees: whether pictures may be among the text, which has nothing of them.

  Raises:
    ApiError: there is something else than text in it, or the template refuses
      it or fails.
  """
  try:
    return template.tokens(plain(messages, sees), tokenizer)
  except RefusedError as error:
    raise wrong('messages', str(error)) from error


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


def plain(messages: list[Message], sees: bool = False) -> list[dict[str, str]]:
  """Messages as templates take them: of text alone, without their pictures.

  Raises:
    ApiError: there is something else in them.
  """
  if not 1 <= len(messages) <= _MOST_MESSAGES:
    raise wrong(
      'messages',
      f'messages must be 1 to {_MOST_MESSAGES:,}, got {len(messages)}.',
    )
  return [_plain(message, i, sees) for i, message in enumerate(messages)]


def _plain(message: Message, i: int, sees: bool) -> dict[str, Any]:
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
    # As other servers of this protocol do: words of two parts are two words.
    content = '\n'.join(
      _text_of(part, where, sees)
      for part in content
      if not (sees and part.type == 'image_url')
    )
  if content is None:
    raise wrong(f'{where}.content', f'{where}.content must be a text.')
  # What newer clients call developer, templates know as system.
  role = 'system' if message.role == 'developer' else message.role
  return {'role': role, 'content': content}


def _text_of(part: ContentPart, where: str, sees: bool) -> str:
  if part.type != 'text' or part.text is None:
    raise wrong(
      f'{where}.content',
      f'{where}.content must be text{" or image_url" if sees else ""}: this '
      'model takes nothing else, got a '
      f'part of type {part.type[:40]!r}.',
    )
  return part.text
