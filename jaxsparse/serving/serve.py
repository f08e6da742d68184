# SPDX-License-Identifier: Apache-2.0
"""From an engine and a socket to a server that runs until it is told to end."""

import contextlib
import os
import socket
import sys
from collections.abc import Sequence

from jaxsparse.config.errors import UserError
from jaxsparse.serving import app
from jaxsparse.serving.http_server import Server
from jaxsparse.serving.service import Service


def serve(
  service: Service,
  listener: socket.socket,
  *,
  key: str = '',
  origins: Sequence[str] = (),
  drain_seconds: float = 30.0,
) -> None:
  """Starts the engine and serves until a signal or the engine ends it.

  Raises:
    UserError: the engine could not be made of what was asked for.
    SystemExit: with 1 if the engine failed.
  """
  engine = service.engine

  def drain() -> None:
    if engine.state == 'starting':
      # Nobody waits for anything, and XLA can't be interrupted.
      say('Ended before it was ready.')
      _exit(0)
    if not engine.drain(drain_seconds):
      say(f'What ran longer than {drain_seconds:g} s was cut off.')

  engine.start()
  server = Server(
    app.make(service, key, origins),
    drain,
    is_dead=lambda: engine.failure is not None,
  )
  server.run(sockets=[listener])
  failure = engine.failure
  if isinstance(failure, UserError):
    raise failure
  if failure is not None:
    sys.exit(1)


def _exit(code: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def listen(host: str, port: int) -> socket.socket:
  """A socket that listens.

  Raises:
    UserError: the port is taken, or the host is not of this machine.
  """
  try:
    (family, *_, address), *_ = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return socket.create_server(address, family=family)
  except (OSError, UnicodeError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f"--host={host} --port={port} can't be listened at ({reason}): give "
      'others.'
    ) from error


def say(text: str) -> None:
  with contextlib.suppress(OSError):
    print(text, file=sys.stderr, flush=True)
