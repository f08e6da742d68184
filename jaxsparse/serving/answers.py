# SPDX-License-Identifier: Apache-2.0
"""From events to answers: whole, or as a stream of server-sent events."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Protocol

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from jaxsparse.inference.jobs import Event, Job, TokenLogprob
from jaxsparse.serving.errors import ApiError
from jaxsparse.serving.gate import while_connected
from jaxsparse.serving.options import Options
from jaxsparse.serving.prompts import Prompt
from jaxsparse.serving.work import Work, log

# Proxies must neither keep nor hold back a stream.
_STREAM_HEADERS = {
  'content-type': 'text/event-stream',
  'cache-control': 'no-cache',
  'x-accel-buffering': 'no',
}


# Of silence, such as while a long prompt is read, after which a comment is
# sent: proxies close what is silent. Clients pass comments over.
QUIET_SECONDS = 10.0
_COMMENT = b': waiting\n\n'


@dataclasses.dataclass
class Piece:
  """What has come of a choice and was not yet sent."""

  text: str = ''
  tokens: list[int] = dataclasses.field(default_factory=list)
  offsets: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)
  prompt_logprobs: Sequence[TokenLogprob] = ()
  # Nothing of this choice was sent before.
  is_first: bool = False


class Choice:
  """One text of a request, as it comes."""

  def __init__(self, index: int, prompt: Prompt, job: Job):
    self.index, self.prompt, self.job = index, prompt, job
    self.num_drawn = self.num_cached = 0
    self.finish: str | None = None
    self.stop_reason: str | int | None = None
    self._piece = Piece(is_first=True)

  def body(
    self,
    piece: Piece,
    said: dict[str, Any],
    logprobs: Any,
    returns_ids: bool,
  ) -> dict[str, Any]:
    """This choice in an answer or a part of one.

    Args:
      piece: what is told.
      said: its text, under the name that the route has for it.
      logprobs: in the form of the route.
      returns_ids: whether ids of tokens are wanted.
    """
    found = {
      'index': self.index,
      **said,
      'logprobs': logprobs,
      'finish_reason': self.finish,
      'stop_reason': self.stop_reason,
    }
    if returns_ids:
      found['token_ids'] = piece.tokens
      if piece.is_first:
        found['prompt_token_ids'] = self.prompt.tokens
    return found

  def take(self, event: Event) -> None:
    piece = self._piece
    piece.text += event.text
    piece.tokens += event.tokens
    piece.offsets += event.offsets
    piece.logprobs += event.logprobs or ()
    piece.prompt_logprobs = event.prompt_logprobs or piece.prompt_logprobs
    self.num_drawn += len(event.tokens)
    self.num_cached = max(self.num_cached, event.num_cached)
    self.finish, self.stop_reason = event.finish, event.stop_reason

  def release(self) -> Piece:
    """What has come since the last release."""
    piece, self._piece = self._piece, Piece()
    return piece

  @property
  def is_due(self) -> bool:
    """Whether there is something to send, not only what is held back."""
    return bool(self._piece.text or self.finish)


class Form(Protocol):
  """How a route writes its answers."""

  # Of the whole answer, and of a part of a stream.
  kind: str
  part_kind: str

  def whole(self, choice: Choice, piece: Piece) -> dict[str, Any]:
    """A choice of a whole answer."""

  def opening(self, choice: Choice) -> dict[str, Any] | None:
    """What a stream says of a choice before its text."""

  def part(self, choice: Choice, piece: Piece) -> dict[str, Any]:
    """A choice of a part of a stream."""


class Answer:
  """The answer to one request."""

  def __init__(
    self,
    request_id: str,
    created: int,
    model: str,
    form: Form,
    options: Options,
    choices: Sequence[Choice],
    work: Work,
    in_thread: Callable[[Callable[[], bytes]], Awaitable[bytes]],
  ):
    self._head = {'id': request_id, 'created': created, 'model': model}
    self._form, self._options, self._work = form, options, work
    self._in_thread = in_thread
    self._choices = {choice.job.id: choice for choice in choices}

  async def respond(self, receive: Any) -> Response:
    """The response, whole or begun.

    Args:
      receive: of ASGI, which tells that the client has left.

    Raises:
      ApiError: the engine does not take the jobs, or does not finish them.
      ClientDisconnect: the client has left.
    """
    self._work.start()
    if self._options.is_stream:
      return _Stream(self._frames(), self._work)
    try:
      await while_connected(receive, self._follow())
    finally:
      self._work.close()
    # Log-probabilities of long prompts are many.
    body = await self._in_thread(self._whole)
    return Response(body, media_type='application/json')

  def _whole(self) -> bytes:
    choices = [
      self._form.whole(choice, choice.release())
      for choice in self._choices.values()
    ]
    body = self._envelope(self._form.kind, choices) | {'usage': self._usage()}
    return msgspec.json.encode(body)

  async def _follow(self) -> None:
    async for event in self._work.events():
      self._choices[event.job_id].take(event)

  async def _frames(self) -> AsyncIterator[bytes]:
    for choice in self._choices.values():
      if opening := self._form.opening(choice):
        yield self._frame([opening])
    async for event in self._work.events():
      choice = self._choices[event.job_id]
      choice.take(event)
      if choice.is_due:
        yield self._frame([self._form.part(choice, choice.release())])
    if self._options.has_usage:
      yield self._frame([], self._usage())
    yield b'data: [DONE]\n\n'

  def _frame(self, choices: list, usage: dict | None = None) -> bytes:
    body = self._envelope(self._form.part_kind, choices)
    if self._options.has_usage:
      body['usage'] = usage
    return framed(body)

  def _envelope(self, kind: str, choices: list) -> dict[str, Any]:
    head = self._head
    return {
      'id': head['id'],
      'object': kind,
      'created': head['created'],
      'model': head['model'],
      'choices': choices,
    }

  def _usage(self) -> dict[str, Any]:
    choices = list(self._choices.values())
    # A prompt is read once, however many choices continue it.
    firsts = choices[:: self._options.num_choices]
    num_prompt = sum(len(choice.prompt.tokens) for choice in firsts)
    num_drawn = sum(choice.num_drawn for choice in choices)
    num_cached = sum(choice.num_cached for choice in firsts)
    return {
      'prompt_tokens': num_prompt,
      'completion_tokens': num_drawn,
      'total_tokens': num_prompt + num_drawn,
      'prompt_tokens_details': {'cached_tokens': num_cached},
    }


def framed(body: dict[str, Any]) -> bytes:
  return b'data: ' + msgspec.json.encode(body) + b'\n\n'


class _Stream(Response):
  """Server-sent events, which end with the client or the work.

  An error after the headers is one more event, and then nothing: a client takes
  the stream for broken, as it should.
  """

  def __init__(self, frames: AsyncIterator[bytes], work: Work):
    super().__init__(headers=_STREAM_HEADERS)
    del self.headers['content-length']
    self._frames, self._work = frames, work
    self._is_quiet = True

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    async def write() -> None:
      start = {
        'type': 'http.response.start',
        'status': 200,
        'headers': self.raw_headers,
      }
      await send(start)
      comments = asyncio.ensure_future(self._comment(send))
      try:
        async for frame in self._frames:
          self._is_quiet = False
          await _send_part(send, frame)
      except ApiError as error:
        await _send_part(send, framed(error.body))
      except Exception:
        log.exception('a stream failed')
        error = ApiError(500, 'server_error', 'The server failed.')
        await _send_part(send, framed(error.body))
      finally:
        comments.cancel()
      await send({'type': 'http.response.body', 'body': b''})

    try:
      await while_connected(receive, write())
    except ClientDisconnect:
      pass
    finally:
      self._work.close()

  async def _comment(self, send: Any) -> None:
    while True:
      self._is_quiet = True
      await asyncio.sleep(QUIET_SECONDS)
      if self._is_quiet:
        await _send_part(send, _COMMENT)


async def _send_part(send: Any, part: bytes) -> None:
  await send({'type': 'http.response.body', 'body': part, 'more_body': True})
