# SPDX-License-Identifier: Apache-2.0
"""/v1/chat/completions: what an assistant says next."""

import time
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxsparse.data.chat_template import ChatTemplate
from jaxsparse.inference.jobs import TokenLogprob
from jaxsparse.serving import messages, options, pictures
from jaxsparse.serving.answers import Choice, Piece
from jaxsparse.serving.completions import answer, check_least
from jaxsparse.serving.errors import wrong
from jaxsparse.serving.gate import read_body
from jaxsparse.serving.prompts import Prompt, TokenNames
from jaxsparse.serving.protocol import ChatRequest, decode, is_set
from jaxsparse.serving.service import Service

_UNSERVED = ('tools', 'functions', 'audio')


async def chat(request: Request) -> Response:
  """The endpoint."""
  arrival = time.monotonic()
  service: Service = request.app.state.service
  limits = service.limits
  content = await read_body(request, limits.body_bytes, limits.body_seconds)
  service.require_ready()
  template = messages.require(service.template)
  body = decode(content, ChatRequest)
  service.require_model(body.model)
  _check(body)
  wanted = options.of(body, service.vocab_size)
  num_logprobs = _logprobs(body)
  max_tokens = _max_tokens(body)
  prompt = await service.in_thread(_prompt, template, body, service)
  return await answer(
    request,
    _Form(
      service.names,
      has_logprobs=num_logprobs is not None,
      returns_ids=wanted.returns_ids,
    ),
    'chatcmpl',
    body,
    wanted,
    [prompt],
    arrival,
    max_tokens=max_tokens,
    num_logprobs=num_logprobs,
    field='messages',
  )


def _check(body: ChatRequest) -> None:
  for field in _UNSERVED:
    if is_set(getattr(body, field)):
      raise wrong(field, f'{field} is not served here: leave it out.')
  for field in ('tool_choice', 'function_call'):
    if bytes(getattr(body, field)).strip() not in (
      b'null',
      b'"none"',
      b'"auto"',
    ):
      raise wrong(field, f'{field} is not served here: leave it out.')
  if body.modalities not in (None, ['text']):
    raise wrong('modalities', 'modalities must be ["text"] here.')


def _logprobs(body: ChatRequest) -> int | None:
  most = options.MOST_LOGPROBS
  top = int(options.within('top_logprobs', body.top_logprobs, 0, 0, most))
  if top and not body.logprobs:
    raise wrong('top_logprobs', 'top_logprobs needs logprobs: true.')
  return top if body.logprobs else None


def _max_tokens(body: ChatRequest) -> int | None:
  given, name = body.max_completion_tokens, 'max_completion_tokens'
  if given is None:
    given, name = body.max_tokens, 'max_tokens'
  if given is None:
    return None
  if given < 1:
    raise wrong(name, f'{name} must be at least 1, got {str(given)[:20]}.')
  check_least(body, given)
  return given


def _prompt(
  template: ChatTemplate, body: ChatRequest, service: Service
) -> Prompt:
  said, limit = body.messages, service.engine.limit
  settings = service.pictures
  tokens = messages.tokens(
    template, said, service.tokenizer, sees=settings is not None
  )
  if len(tokens) > limit:
    raise options.too_long(len(tokens), limit, 'messages')
  picture = pictures.of_chat(said, settings) if settings else None
  return Prompt(tuple(tokens.tolist()), None, picture)


class _Form:
  """Choices with a message, and log-probabilities token by token."""

  kind, part_kind = 'chat.completion', 'chat.completion.chunk'

  def __init__(
    self, names: TokenNames, *, has_logprobs: bool, returns_ids: bool
  ):
    self._names = names
    self._has_logprobs, self._returns_ids = has_logprobs, returns_ids

  def opening(self, choice: Choice) -> dict[str, Any]:
    return {
      'index': choice.index,
      'delta': {'role': 'assistant', 'content': ''},
      'logprobs': None,
      'finish_reason': None,
      'stop_reason': None,
    }

  def whole(self, choice: Choice, piece: Piece) -> dict[str, Any]:
    message = {'role': 'assistant', 'content': piece.text}
    return self._choice(choice, piece, 'message', message)

  def part(self, choice: Choice, piece: Piece) -> dict[str, Any]:
    delta = {'content': piece.text} if piece.text else {}
    return self._choice(choice, piece, 'delta', delta)

  def _choice(
    self, choice: Choice, piece: Piece, name: str, said: dict[str, Any]
  ) -> dict[str, Any]:
    logprobs = None
    if self._has_logprobs:
      logprobs = {'content': [self._entry(one) for one in piece.logprobs]}
    return choice.body(piece, {name: said}, logprobs, self._returns_ids)

  def _entry(self, one: TokenLogprob) -> dict[str, Any]:
    top = [self._named(token, logprob) for token, logprob in one.top]
    return self._named(one.token, one.logprob) | {'top_logprobs': top}

  def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
    content = self._names.bytes_of(token)
    return {
      'token': self._names(token),
      'logprob': logprob,
      'bytes': list(content) if content else None,
    }
