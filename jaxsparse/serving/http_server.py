# SPDX-License-Identifier: Apache-2.0
"""uvicorn with the limits it lacks, and an end that finishes what runs."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import h11
import msgspec
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxsparse.serving.errors import ApiError

# Seconds: for a request's headers to be there, and then for its body; for a
# client to take what waits for it.
REQUEST_SECONDS = 10.0
_GRACE_SECONDS = 2.0
WRITE_SECONDS = 30.0

MOST_CONNECTIONS = 512

# Of a connection that waits to be taken.
_BACKLOG = 1024

# What is left when the engine has drained is on its way to clients.
_LAST_BYTES_SECONDS = 5

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Protocol(H11Protocol):
  """A connection that ends if its client stalls.

  uvicorn itself has a timer between requests only: whoever sends a byte of a
  header now and then keeps a connection for ever, and whoever reads nothing,
  too.
  """

  request_seconds = REQUEST_SECONDS
  write_seconds = WRITE_SECONDS
  most_connections = MOST_CONNECTIONS

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self._app, self.app = self.app, self._guarded
    self._reading: asyncio.TimerHandle | None = None
    # Of the client, when that timer was started.
    self._reading_state: Any = None
    self._writing: asyncio.TimerHandle | None = None

  async def _guarded(self, scope: Any, receive: Any, send: Any) -> None:
    if len(self.connections) > self.most_connections:
      error = ApiError(
        503, 'unavailable', 'Too many connections are open.', retry_after=1
      )
      response = error.response()
      response.headers['connection'] = 'close'
      await response(scope, receive, send)
      return
    await self._app(scope, receive, send)

  def connection_made(self, transport: Any) -> None:
    super().connection_made(transport)
    # Headers and body are two writes: the second would wait for the client to
    # acknowledge the first.
    kernel = transport.get_extra_info('socket')
    kernel.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self._watch_request()

  def handle_events(self) -> None:
    super().handle_events()
    self._watch_request()

  def on_response_complete(self) -> None:
    super().on_response_complete()
    self._watch_request()

  def _watch_request(self) -> None:
    """Has the timer run while bytes of a request are missing."""
    # Between requests uvicorn's own runs.
    is_idle = (
      self.cycle is not None
      and self.conn.their_state is h11.IDLE
      and self.timeout_keep_alive_task is not None
    )
    state = self.conn.their_state
    if is_idle or state not in (h11.IDLE, h11.SEND_BODY):
      state = None
    if state is self._reading_state:
      return
    if self._reading:
      self._reading.cancel()
    self._reading_state = state
    self._reading = state and self.loop.call_later(
      # An app may tell of a body that is late.
      self.request_seconds + (_GRACE_SECONDS if state is h11.SEND_BODY else 0),
      self.transport.abort,
    )

  def pause_writing(self) -> None:
    super().pause_writing()
    self._writing = self._writing or self.loop.call_later(
      self.write_seconds, self.transport.abort
    )

  def resume_writing(self) -> None:
    super().resume_writing()
    if self._writing:
      self._writing.cancel()
      self._writing = None

  def connection_lost(self, exc: Exception | None) -> None:
    super().connection_lost(exc)
    for timer in (self._reading, self._writing):
      if timer:
        timer.cancel()

  def send_400_response(self, msg: str) -> None:
    if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
      self.transport.abort()
      return
    body = msgspec.json.encode(
      ApiError(400, 'invalid_value', 'This is no request of HTTP/1.1.').body
    )
    headers = [
      (b'content-type', b'application/json'),
      (b'content-length', str(len(body)).encode()),
      (b'connection', b'close'),
    ]
    for event in (
      h11.Response(status_code=400, headers=headers, reason=b'Bad Request'),
      h11.Data(data=body),
      h11.EndOfMessage(),
    ):
      self.transport.write(self.conn.send(event))
    self.transport.close()


class Server(uvicorn.Server):
  """A server that SIGTERM ends with 0, once what runs is finished.

  uvicorn itself would end by the signal. The socket stays open while the engine
  drains, so that a balancer is told and not refused; a second signal ends the
  process at once.
  """

  def __init__(
    self,
    app: Any,
    drain: Callable[[], Any],
    is_dead: Callable[[], bool],
    protocol: type[Protocol] = Protocol,
  ):
    """Makes the server.

    Args:
      app: of ASGI.
      drain: finishes what runs; called in a thread of its own.
      is_dead: whether there is nothing left to serve with.
      protocol: of connections.
    """
    super().__init__(
      uvicorn.Config(
        app,
        loop='asyncio',
        http=protocol,
        ws='none',
        lifespan='on',
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=_LAST_BYTES_SECONDS,
      )
    )
    self._drain, self._is_dead = drain, is_dead
    self._drainer: threading.Thread | None = None

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
      yield
      return
    loop = asyncio.get_running_loop()

    def on_signal(number: int, frame: FrameType | None) -> None:
      if self._drainer:
        os._exit(128 + number)
      self._drainer = threading.Thread(
        target=self._finish, args=(loop,), daemon=True
      )
      self._drainer.start()

    former = {number: signal.signal(number, on_signal) for number in _SIGNALS}
    try:
      yield
    finally:
      for number, handler in former.items():
        signal.signal(number, handler)

  def _finish(self, loop: asyncio.AbstractEventLoop) -> None:
    try:
      self._drain()
    finally:
      # Behind the events that are on their way to the loop.
      loop.call_soon_threadsafe(setattr, self, 'should_exit', True)

  async def on_tick(self, counter: int) -> bool:
    return await super().on_tick(counter) or self._is_dead()
