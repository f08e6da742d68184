# SPDX-License-Identifier: Apache-2.0
"""A template that turns a chat into a prompt, in a sandbox.

A template comes with a model, from whoever made it: it must not run code.
"""

import pathlib
import secrets
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxsparse.config.errors import UserError
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
    # No message can hold it.
    self._mark = f'<{secrets.token_hex(16)}>'

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

  def render(self, messages: list[dict[str, str]]) -> list[str]:
    """The prompt of a chat, up to where the assistant speaks.

    Args:
      messages: dicts of 'role' and 'content'.

    Returns:
      Texts with a boundary token between each two, where the template has its
      `eos_token`. What stands in a message is never taken for one.

    Raises:
      ApiError: the template refuses them or fails.
    """
    try:
      text = self._template.render(
        messages=messages,
        add_generation_prompt=True,
        # Every prompt begins with it.
        bos_token='',
        eos_token=self._mark,
      )
      return text.split(self._mark)
    except _Refusal as error:
      raise wrong('messages', f'The chat template refuses: {error}.') from error
    except (jinja2.TemplateError, ArithmeticError, LookupError) as error:
      raise _failed(error) from error
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
      raise _failed(error) from error


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
