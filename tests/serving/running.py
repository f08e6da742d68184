# SPDX-License-Identifier: Apache-2.0
"""A server in a thread, with an engine that has no model."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time

from fake_engine import FakeEngine

from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.serving import app
from jaxsparse.serving.http_server import Protocol, Server
from jaxsparse.serving.service import Limits, Service

NAME = 'tiny'


class Running:
  """A server that answers on a port of this machine."""

  def __init__(self, engine, service, port):
    self.engine, self.service, self.port = engine, service, port
    self.url = f'http://127.0.0.1:{port}'

  def connection(self):
    return http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)

  def request(self, method, path, body=None, headers=None):
    """Status, headers and content of an answer; a body that is no bytes is
    sent as JSON."""
    headers = dict(headers or {})
    if body is not None and not isinstance(body, bytes):
      body = json.dumps(body).encode()
    if body is not None:
      headers.setdefault('content-type', 'application/json')
    connection = self.connection()
    try:
      connection.request(method, path, body, headers)
      answer = connection.getresponse()
      return answer.status, answer.headers, answer.read()
    finally:
      connection.close()

  def get(self, path, **headers):
    return self.request('GET', path, headers=headers)

  def post(self, path, body, **headers):
    """Status and JSON of an answer."""
    status, _, content = self.request('POST', path, body, headers)
    return status, json.loads(content)

  def socket(self):
    return socket.create_connection(('127.0.0.1', self.port), timeout=10)

  def until_idle(self, seconds=5.0):
    """Waits until the engine has nothing left."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      stats = self.engine.stats()
      if not stats.running + stats.waiting:
        return stats
      time.sleep(0.01)
    raise AssertionError(stats)


@contextlib.contextmanager
def running(
  engine=None, *, key='', origins=(), protocol=Protocol, limits=None, **service
):
  """A server for as long as the block runs."""
  engine = engine or FakeEngine()
  engine.start()
  served = Service(
    engine,
    ByteTokenizer(),
    name=NAME,
    vocab_size=257,
    step=lambda: 20,
    limits=limits or Limits(),
    **service,
  )
  server = Server(
    app.make(served, key, origins),
    drain=lambda: None,
    is_dead=lambda: False,
    protocol=protocol,
  )
  listener = socket.create_server(('127.0.0.1', 0))
  thread = threading.Thread(
    target=lambda: asyncio.run(server.serve([listener])), daemon=True
  )
  thread.start()
  while not server.started:
    time.sleep(0.005)
  try:
    yield Running(engine, served, listener.getsockname()[1])
  finally:
    server.should_exit = True
    thread.join(10)
    # Its thread would go on beside all later tests.
    engine.drain(0)
