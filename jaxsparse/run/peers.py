# SPDX-License-Identifier: Apache-2.0
"""The processes of one run meet, watch each other and end together.

Process 0 listens at the coordinator's address until all others have come. The
connections stay: one that breaks says within moments that its process is gone,
and a process that fails says so before it ends. JAX's own coordination notices
after minutes, and then aborts with a C++ stack.
"""

import atexit
import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator

from jaxsparse.config.errors import UserError

# A process that hangs up in the middle of a sentence, or never hangs up.
_PATIENCE_SECONDS = 5.0
_LONGEST_MESSAGE = 1 << 16

_GONE = (
  'has ended without a word: it was killed, or its host is out of reach. Start '
  'all processes again, and they go on from the newest checkpoint.'
)


class _Peers:
  """The others of this process: all of them for process 0, which for them."""

  def __init__(
    self, index: int, count: int, connections: dict[int, socket.socket]
  ):
    self._index, self._count = index, count
    self._connections = connections
    # Whoever takes it ends the process, and never gives it back.
    self._is_ending = threading.Lock()
    threading.Thread(target=self._watch, daemon=True).start()
    # Before JAX's own, which waits for all.
    atexit.register(self._say_goodbye)

  def end(self, sentence: str, code: int) -> None:
    """Ends this process, and with it all others, with a sentence."""
    self._is_ending.acquire()
    for stream in (sys.stdout, sys.stderr):
      with contextlib.suppress(OSError, ValueError):
        if stream is sys.stderr:
          print(f'error: {sentence}', file=stream)
        stream.flush()
    if not sentence.startswith('process '):
      sentence = f'{self._name(self._index)}: {sentence}'
    for connection in self._connections.values():
      _send(connection, end=sentence, code=code)
      with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
    # Until they hang up, too: what was sent could be lost.
    deadline = time.monotonic() + _PATIENCE_SECONDS
    for connection in self._connections.values():
      with contextlib.suppress(OSError):
        connection.settimeout(max(deadline - time.monotonic(), 0.01))
        while connection.recv(_LONGEST_MESSAGE):
          pass
    os._exit(code)

  def _name(self, index: int) -> str:
    return f'process {index} of {self._count}'

  def _watch(self) -> None:
    with selectors.DefaultSelector() as selector:
      for index, connection in self._connections.items():
        selector.register(connection, selectors.EVENT_READ, index)
      while selector.get_map():
        for key, _ in selector.select():
          message = _receive(key.fileobj)
          if not message.get('goodbye'):
            gone = f'{self._name(key.data)} {_GONE}'
            self.end(message.get('end', gone), message.get('code', 1))
          selector.unregister(key.fileobj)

  def _say_goodbye(self) -> None:
    for connection in self._connections.values():
      _send(connection, goodbye=True)


_peers: _Peers | None = None


def meet(address: str, count: int, index: int, wait_seconds: float) -> str:
  """Returns when all processes have come, and watches them from then on.

  Args:
    address: HOST:PORT of process 0.
    count: of processes.
    index: of this one.
    wait_seconds: how long to wait.

  Returns:
    Where this process reaches what JAX starts at `address`.

  Raises:
    UserError: the port is in use, or a process has not come in time, has
      another number of processes, or has the index of another.
  """
  global _peers
  host, _, port = address.rpartition(':')
  host = host.strip('[]')
  deadline = time.monotonic() + wait_seconds
  waiting = f'{wait_seconds:g} seconds (--wait_seconds)'
  if index == 0:
    connections = _receive_others(int(port), count, deadline, waiting)
  else:
    _say(f'Waiting up to {waiting} for process 0 of {count} at {address}.')
    hello = dict(index=index, count=count)
    process_zero = _reach_process_zero(
      host, int(port), hello, deadline, waiting
    )
    connections = {0: process_zero}
    address = f'127.0.0.1:{_relay(host, int(port))}'
  _peers = _Peers(index, count, connections)
  return address


@contextlib.contextmanager
def all_end_together() -> Iterator[None]:
  """An error in the block ends this process and all that it has met.

  With a `UserError` by its sentence. A single process raises it as ever.
  """
  try:
    yield
  except (Exception, KeyboardInterrupt) as error:
    if _peers is None:
      raise
    # If another's end caused it, that is reported meanwhile.
    time.sleep(1)
    if isinstance(error, UserError):
      _peers.end(str(error), 2)
    traceback.print_exc()
    _peers.end(f'{type(error).__name__}: {error}'.splitlines()[0], 1)


def _receive_others(
  port: int, count: int, deadline: float, waiting: str
) -> dict[int, socket.socket]:
  """A connection to each process but 0, which is this one."""
  connections = {}
  try:
    with _listen(port) as server:
      _say(f'Waiting up to {waiting} for the others of {count} at port {port}.')
      while len(connections) < count - 1:
        server.settimeout(max(deadline - time.monotonic(), 0.01))
        connection, _ = server.accept()
        # One that was killed meanwhile may have been started again.
        for gone in [i for i, c in connections.items() if _is_closed(c)]:
          del connections[gone]
        index = _welcome(connection, count, connections)
        if index is not None:
          connections[index] = connection
  except TimeoutError:
    missing = sorted({*range(1, count)} - {*connections})
    several = 'es' if len(missing) > 1 else ''
    sentence = (
      f'process{several} {", ".join(map(str, missing))} of {count} did not '
      f'come within {waiting}: start all of them, with the same --coordinator.'
    )
    for connection in connections.values():
      _send(connection, end=sentence)
    raise UserError(sentence) from None
  for connection in connections.values():
    _send(connection, go=True)
  return connections


def _listen(port: int) -> socket.socket:
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(
        ('', port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
      )
    return socket.create_server(('', port), backlog=1024)
  except OSError as error:
    raise UserError(
      f"port {port} of --coordinator can't be used ({os.strerror(error.errno)})"
      ': give a free one to all processes.'
    ) from error


def _welcome(
  connection: socket.socket, count: int, connections: dict[int, socket.socket]
) -> int | None:
  """The index of the process that has come, if it is one of this run."""
  connection.settimeout(_PATIENCE_SECONDS)
  hello = _receive(connection)
  connection.settimeout(None)
  index, its_count = hello.get('index'), hello.get('count')
  trouble = ''
  if not (isinstance(index, int) and isinstance(its_count, int)):
    trouble = 'jaxsparse listens here, for its own processes.'
  elif its_count != count:
    trouble = (
      f'--num_processes={its_count} of process {index} must be that of process '
      f'0, {count}.'
    )
  elif index in connections:
    trouble = f'--process_id={index} is that of two processes.'
  if not trouble:
    _keep_alive(connection)
    return index
  _send(connection, end=trouble)
  connection.close()
  return None


def _reach_process_zero(
  host: str, port: int, hello: dict, deadline: float, waiting: str
) -> socket.socket:
  """A connection to process 0, once all have come."""
  while True:
    trouble: object = 'something else answers'
    try:
      left = max(deadline - time.monotonic(), 0.01)
      connection = socket.create_connection((host, port), timeout=left)
      _send(connection, **hello)
      # Process 0 began to wait later, perhaps, and says if one is missing.
      connection.settimeout(left + _PATIENCE_SECONDS)
      answer = _receive(connection)
      if answer.get('go'):
        connection.settimeout(None)
        _keep_alive(connection)
        return connection
      connection.close()
      if 'end' in answer:
        raise UserError(answer['end'])
    except OSError as error:
      trouble = error.strerror or error
    if time.monotonic() > deadline:
      raise UserError(
        f'process 0 of {hello["count"]} did not answer at {host}:{port} within '
        f'{waiting} ({trouble}): start it there, with the same --coordinator.'
      )
    time.sleep(0.2)


def _relay(host: str, port: int) -> int:
  """A local port that leads to process 0, and stays open when that is gone.

  JAX aborts a process in the moment in which its own connection to process 0
  breaks, before anything can be said.
  """
  server = socket.create_server(('127.0.0.1', 0))

  def copy(source: socket.socket, target: socket.socket, is_out: bool) -> None:
    with contextlib.suppress(OSError):
      while data := source.recv(1 << 16):
        target.sendall(data)
      if is_out:
        target.shutdown(socket.SHUT_WR)

  def serve() -> None:
    while True:
      near, _ = server.accept()
      far = _connect(host, port, time.monotonic() + _PATIENCE_SECONDS)
      if far is None:
        near.close()
        continue
      for arguments in ((near, far, True), (far, near, False)):
        threading.Thread(target=copy, args=arguments, daemon=True).start()

  threading.Thread(target=serve, daemon=True).start()
  return server.getsockname()[1]


def _connect(host: str, port: int, deadline: float) -> socket.socket | None:
  while time.monotonic() < deadline:
    with contextlib.suppress(OSError):
      return socket.create_connection((host, port))
    time.sleep(0.05)
  return None


def _send(connection: socket.socket, **message) -> None:
  # The watch reports one that is gone.
  with contextlib.suppress(OSError):
    connection.sendall(json.dumps(message).encode() + b'\n')


def _receive(connection: socket.socket) -> dict:
  """The next message; nothing from one that is gone or speaks otherwise."""
  line = b''
  with contextlib.suppress(OSError, ValueError):
    while not line.endswith(b'\n') and len(line) < _LONGEST_MESSAGE:
      byte = connection.recv(1)
      if not byte:
        return {}
      line += byte
    message = json.loads(line)
    return message if isinstance(message, dict) else {}
  return {}


def _is_closed(connection: socket.socket) -> bool:
  connection.setblocking(False)
  try:
    return not connection.recv(1, socket.MSG_PEEK)
  except BlockingIOError:
    return False
  except OSError:
    return True
  finally:
    connection.setblocking(True)


def _keep_alive(connection: socket.socket) -> None:
  """Lets a host that is out of reach count as gone after half a minute."""
  connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  for name, value in dict(KEEPIDLE=10, KEEPINTVL=5, KEEPCNT=4).items():
    if option := getattr(socket, f'TCP_{name}', None):
      connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
