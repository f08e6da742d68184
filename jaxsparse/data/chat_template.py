# SPDX-License-Identifier: Apache-2.0
"""A template that turns a chat into a prompt, in a sandbox.

A template comes with a model, from whoever made it: it must not run code.
"""

import functools
import pathlib
import secrets
from collections.abc import Iterable, Sequence
from typing import NoReturn

import jinja2
import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxsparse.config.errors import UserError
from jaxsparse.data import tokenizer_roles
from jaxsparse.data.spelling import split_at
from jaxsparse.data.tokenizer import Tokenizer

ROLES = ('system', 'developer', 'user', 'assistant')

Messages = Sequence[dict[str, str]]


class RefusedError(Exception):
  """Messages that a template refuses or fails on, in a sentence."""


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
  def read(cls, path: str, setting: str) -> 'ChatTemplate':
    """The template in a file.

    Args:
      path: of the file.
      setting: by which it was named, such as 'data.chat_template'.

    Raises:
      UserError: it can't be read, or is none.
    """
    try:
      source = pathlib.Path(path).expanduser().read_text('utf-8')
    except (OSError, ValueError, RuntimeError) as error:
      raise UserError(
        f"{setting}={path} can't be read ({error}): name a file with a "
        'template of Jinja.'
      ) from error
    return cls(source, f'{setting}={path}')

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

  def tokens(self, messages: Messages, tokenizer: Tokenizer) -> np.ndarray:
    """The prompt of a chat, up to where the assistant speaks: int32 [T].

    Markers that the template writes become their tokens; in a message they are
    text like any other. A prompt begins as a document does, unless the template
    begins it with a marker of its own.

    Args:
      messages: dicts of 'role' and 'content'.
      tokenizer: of the model.

    Raises:
      RefusedError: the template refuses them or fails.
    """
    text = self._render(self._safe(messages, tokenizer), tokenizer, True)
    return np.array(self._begun(self._ids(text, tokenizer), tokenizer))

  def answers(
    self, messages: Messages, tokenizer: Tokenizer
  ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Chats from whose answers a model learns to go on as the assistant.

    An answer is split into tokens apart from the prompt before it, as when the
    model writes it, and ends with a token that ends answers. What a template
    writes behind that is no part of it.

    Most templates give one sequence. One that writes former turns otherwise
    than they were, without thoughts for one, gives another from there on, whose
    former turns are none of its answers.

    Args:
      messages: dicts of 'role' and 'content'.
      tokenizer: of the model.

    Returns:
      Of each sequence the tokens, int32 [T], and which answer they belong to,
      int32 [T], as the index of its message; -1 for none.

    Raises:
      RefusedError: the template refuses them, fails, or writes an answer
        otherwise than behind its prompt or without a token that ends it.
    """
    safe = self._safe(messages, tokenizer)
    found: list[tuple[list[int], list[int]]] = []
    done = None
    for i, message in enumerate(messages):
      if message['role'] != 'assistant':
        continue
      prompt = self._render(safe[:i], tokenizer, True)
      whole = self._render(safe[: i + 1], tokenizer, False)
      if not whole.startswith(prompt):
        raise RefusedError(
          f'The chat template writes messages[{i}] otherwise than behind the '
          'prompt that asks for it.'
        )
      if done is None or not prompt.startswith(done):
        found.append((ids := [], of := []))
        ids += self._begun(self._ids(prompt, tokenizer), tokenizer)
      else:
        ids += self._ids(prompt[len(done) :], tokenizer)
      of += [-1] * (len(ids) - len(of))
      answer = self._ids(whole[len(prompt) :], tokenizer)
      ends = [k for k, x in enumerate(answer) if x in tokenizer.stop_ids]
      if not ends:
        raise RefusedError(
          f'The chat template ends messages[{i}] with no token that ends an '
          'answer.'
        )
      ids += answer
      of += [i] * (ends[0] + 1) + [-1] * (len(answer) - ends[0] - 1)
      done = whole
    return [(np.array(a, np.int32), np.array(b, np.int32)) for a, b in found]

  def _safe(
    self, messages: Messages, tokenizer: Tokenizer
  ) -> list[dict[str, str]]:
    """The messages, of which none holds a marker."""
    markers = tuple(tokenizer.markers)
    return [
      message | {'content': self._broken(message['content'], markers)}
      for message in messages
    ]

  def _render(self, safe: Messages, tokenizer: Tokenizer, asks: bool) -> str:
    """The text of a chat, `asks` whether the assistant is to speak next."""
    texts = {i: text for text, i in tokenizer.markers.items()}
    try:
      return self._template.render(
        messages=safe,
        add_generation_prompt=asks,
        tools=None,
        documents=None,
        bos_token=texts.get(tokenizer.begin_id, ''),
        eos_token=texts.get(tokenizer.stop_ids[0], self._end),
      )
    except _Refusal as error:
      raise RefusedError(f'The chat template refuses: {error}.') from error
    except (jinja2.TemplateError, ArithmeticError, LookupError) as error:
      raise _failed(error) from error
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
      raise _failed(error) from error

  def _ids(self, text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of what `_render` wrote, or of a part of it."""
    ids: list[int] = []
    for i, turn in enumerate(text.split(self._end)):
      ids += [tokenizer.stop_ids[0]] * (i > 0)
      ids += [token for part in self._parts(turn, tokenizer) for token in part]
    return ids

  def _begun(self, ids: list[int], tokenizer: Tokenizer) -> list[int]:
    is_begun = bool(ids) and ids[0] in tokenizer.markers.values()
    return ids if is_begun else [tokenizer.begin_id, *ids]

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
    words = content.strip()
    before, _, after = content.partition(words) if words else (content, '', '')
    if words.startswith(_rests(markers)):
      words = self._break + words
    if words.endswith(_beginnings(markers)):
      words += self._break
    return before + words + after

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


def _failed(error: Exception) -> RefusedError:
  return RefusedError(
    f'The chat template fails on these messages ({type(error).__name__}).'
  )
