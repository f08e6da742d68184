# SPDX-License-Identifier: Apache-2.0
"""/v1/completions: texts that continue prompts."""

import dataclasses
import time
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxsparse.inference.jobs import Job, TokenLogprob
from jaxsparse.serving import grammars, options, prompts
from jaxsparse.serving.answers import Answer, Choice, Form, Piece
from jaxsparse.serving.errors import wrong
from jaxsparse.serving.gate import read_body
from jaxsparse.serving.options import Options
from jaxsparse.serving.prompts import Prompt, TokenNames
from jaxsparse.serving.protocol import (
  CompletionRequest,
  GenerationRequest,
  decode,
)
from jaxsparse.serving.service import Service
from jaxsparse.serving.work import Work

# As in OpenAI's protocol, and as surprising.
_MAX_TOKENS = 16


async def complete(request: Request) -> Response:
  """The endpoint."""
  arrival = time.monotonic()
  service: Service = request.app.state.service
  limits = service.limits
  content = await read_body(request, limits.body_bytes, limits.body_seconds)
  service.require_ready()
  body = decode(content, CompletionRequest)
  service.require_model(body.model)
  wanted = options.of(body, service.vocab_size)
  num_logprobs = _logprobs(body)
  found = await service.in_thread(
    prompts.read,
    body.prompt,
    service.tokenizer,
    vocab_size=service.vocab_size,
    limit=service.engine.limit,
    has_boundary=body.add_special_tokens is not False,
  )
  max_tokens = _max_tokens(body)
  form = _Form(
    service.tokenizer,
    service.names,
    echoes=bool(body.echo),
    has_logprobs=num_logprobs is not None,
    returns_ids=wanted.returns_ids,
  )
  return await answer(
    request,
    form,
    'cmpl',
    body,
    wanted,
    found,
    arrival,
    max_tokens=max_tokens,
    num_logprobs=num_logprobs,
    wants_prompt_logprobs=bool(body.echo) and num_logprobs is not None,
  )


async def answer(
  request: Request,
  form: Form,
  prefix: str,
  body: GenerationRequest,
  wanted: Options,
  found: Sequence[Prompt],
  arrival: float,
  *,
  max_tokens: int | None,
  num_logprobs: int | None,
  wants_prompt_logprobs: bool = False,
  field: str = 'prompt',
) -> Response:
  """The answer of the engine to prompts, in a route's form.

  Args:
    request: whose client waits.
    form: of the route.
    prefix: of the answer's id.
    body: of the request.
    wanted: its options.
    found: its prompts.
    arrival: when it came, of `time.monotonic`.
    max_tokens: to draw; None for as many as fit.
    num_logprobs: of the best tokens; None for no log-probabilities.
    wants_prompt_logprobs: whether the prompts' tokens are scored, too.
    field: that holds the prompts.
  """
  service: Service = request.app.state.service
  num_choices = wanted.num_choices
  options.check_choices(len(found), num_choices, service.engine.stats().slots)
  grammar = await grammars.of(body)
  request_id = f'{prefix}-{uuid.uuid4().hex}'
  adapter = service.require_model(body.model)
  choices = []
  for prompt in found:
    room = options.room(
      len(prompt.tokens), max_tokens, service.engine.limit, field
    )
    for j in range(num_choices):
      index = len(choices)
      sampling = wanted.sampling
      job = Job(
        id=f'{request_id}-{index}',
        tokens=prompt.tokens,
        max_tokens=room,
        sampling=dataclasses.replace(
          sampling,
          seed=(sampling.seed + j) % 2**32,
          min_tokens=min(sampling.min_tokens, room),
        ),
        stop=wanted.stop,
        include_stop=wanted.include_stop,
        stop_token_ids=wanted.stop_token_ids,
        num_logprobs=num_logprobs,
        wants_prompt_logprobs=wants_prompt_logprobs,
        salt=wanted.salt,
        grammar=grammar,
        adapter=adapter,
        picture=prompt.picture,
      )
      choices.append(Choice(index, prompt, job))
  assert service.delivery is not None
  work = Work(
    service.engine,
    service.delivery,
    service.metrics,
    [choice.job for choice in choices],
    arrival,
    service.limits.request_seconds,
    service.on_text,
  )
  created = int(time.time())
  answer = Answer(
    request_id,
    created,
    adapter or service.name,
    form,
    wanted,
    choices,
    work,
    service.in_thread,
  )
  return await answer.respond(request.receive)


def _logprobs(body: CompletionRequest) -> int | None:
  if body.logprobs is None:
    return None
  most = options.MOST_LOGPROBS
  return int(options.within('logprobs', body.logprobs, 0, 0, most))


def _max_tokens(body: CompletionRequest) -> int:
  if body.best_of is not None and body.best_of != (body.n or 1):
    raise wrong(
      'best_of', f'best_of must equal n here, got {str(body.best_of)[:20]}.'
    )
  if body.suffix:
    raise wrong('suffix', 'suffix is not served here: leave it out.')
  max_tokens = _MAX_TOKENS if body.max_tokens is None else body.max_tokens
  least = 0 if body.echo else 1
  if max_tokens < least:
    raise wrong(
      'max_tokens',
      f'max_tokens must be at least {least}'
      f'{"" if body.echo else " without echo"}, got {str(max_tokens)[:20]}.',
    )
  check_least(body, max_tokens)
  return max_tokens


def check_least(body: GenerationRequest, max_tokens: int) -> None:
  if body.min_tokens is not None and body.min_tokens > max_tokens:
    raise wrong(
      'min_tokens',
      f'min_tokens must be at most max_tokens, got {body.min_tokens} and '
      f'{max_tokens}.',
    )


class _Form:
  """Choices with a text, and log-probabilities in four lists."""

  kind = part_kind = 'text_completion'

  def __init__(
    self,
    tokenizer: Any,
    names: TokenNames,
    *,
    echoes: bool,
    has_logprobs: bool,
    returns_ids: bool,
  ):
    self._tokenizer, self._names, self._echoes = tokenizer, names, echoes
    self._has_logprobs, self._returns_ids = has_logprobs, returns_ids

  def opening(self, choice: Choice) -> None:
    return None

  def whole(self, choice: Choice, piece: Piece) -> dict[str, Any]:
    return self.part(choice, piece)

  def part(self, choice: Choice, piece: Piece) -> dict[str, Any]:
    text, logprobs, is_echo = piece.text, None, self._echoes and piece.is_first
    # Only where it is asked for: decoding a long prompt takes its time.
    prompt = ''
    if is_echo or self._has_logprobs:
      prompt = choice.prompt.text(self._tokenizer)
    if self._has_logprobs:
      logprobs = _Lists(self._names)
      if is_echo:
        tokens = choice.prompt.tokens
        offsets = prompts.offsets(self._tokenizer, tokens, prompt)
        logprobs.add(piece.prompt_logprobs, offsets)
      logprobs.add(piece.logprobs, [len(prompt) + o for o in piece.offsets])
    said = {'text': prompt + text if is_echo else text}
    body = logprobs and logprobs.body
    return choice.body(piece, said, body, self._returns_ids)


class _Lists:
  """Log-probabilities as the older of the two protocols has them."""

  def __init__(self, names: TokenNames):
    self._names = names
    self.body: dict[str, list] = {
      'tokens': [],
      'token_logprobs': [],
      'top_logprobs': [],
      'text_offset': [],
    }

  def add(self, found: Sequence[TokenLogprob], offsets: Sequence[int]) -> None:
    body = self.body
    body['text_offset'] += offsets
    for one in found:
      own = self._names(one.token)
      body['tokens'].append(own)
      body['token_logprobs'].append(one.logprob)
      if one.logprob is None:
        body['top_logprobs'].append(None)
        continue
      top: dict[str, float] = {}
      for token, logprob in one.top:
        # The better of two that are spelled alike.
        top.setdefault(self._names(token), logprob)
      top.setdefault(own, one.logprob)
      body['top_logprobs'].append(top)
