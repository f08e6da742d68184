# SPDX-License-Identifier: Apache-2.0
"""Clients that leave, that send slowly, that read nothing."""

import json
import socket
import time

import openai
import pytest
from fake_engine import FakeEngine
from running import NAME, running

from jaxsparse.serving import answers
from jaxsparse.serving.http_server import Protocol
from jaxsparse.serving.service import Limits

TEXT = '/v1/completions'

# Seconds instead of tens of them.
SHORT = 0.3


class Quick(Protocol):
  request_seconds = SHORT
  write_seconds = SHORT
  most_connections = 8


class Narrow(Quick):
  """A connection of which the kernel keeps little."""

  def connection_made(self, transport):
    kernel = transport.get_extra_info('socket')
    kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    super().connection_made(transport)


@pytest.fixture(scope='module')
def server():
  # What is written must be more than sockets hold.
  engine = FakeEngine(slots=2, delay=0.005, limit=4096, max_queue=8)
  limits = Limits(body_bytes=1000, body_seconds=SHORT)
  with running(engine, protocol=Quick, limits=limits) as found:
    yield found


def sent(server, body, head='', length=None):
  """A socket on which a request was written."""
  connection = server.socket()
  content = json.dumps(body).encode() if isinstance(body, dict) else body
  length = len(content) if length is None else length
  connection.sendall(
    f'POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n'
    f'content-length: {length}\r\n{head}\r\n'.encode()
    + content
  )
  return connection


def until(condition, seconds=3.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.005)


def up_to(connection, sign):
  content = b''
  while sign not in content:
    content += connection.recv(1 << 16)
  return content


def rest(connection):
  """All that comes until the server closes."""
  content = b''
  try:
    while part := connection.recv(1 << 16):
      content += part
  except ConnectionResetError:
    pass
  return content


@pytest.mark.parametrize('streams', [False, True])
def test_who_leaves_is_not_written_for(server, streams):
  body = {'prompt': 'a', 'max_tokens': 4000, 'stream': streams}
  connection = sent(server, body)
  until(lambda: server.engine.stats().running == 1)
  connection.close()
  until(lambda: server.engine.stats().running == 0, 1.0)
  steps = server.engine.steps
  time.sleep(0.05)
  assert server.engine.steps <= steps + 1
  assert not server.service.delivery._queues


def test_who_leaves_the_queue_leaves_others_alone(server):
  before = server.engine.stats()
  body = {'prompt': 'a', 'max_tokens': 100, 'n': 2, 'temperature': 0}
  running_one = sent(server, body)
  until(lambda: server.engine.stats().running == 2)
  queued = sent(server, body | {'n': 1})
  until(lambda: server.engine.stats().waiting == 1)
  queued.close()
  until(lambda: server.engine.stats().waiting == 0, 1.0)
  assert server.engine.stats().running == 2
  assert up_to(running_one, b'}}').count(b'"length"') == 2
  running_one.close()
  after = server.engine.stats()
  assert after.cancelled['waiting'] == before.cancelled.get('waiting', 0) + 1


def test_a_body_that_does_not_come_is_408(server):
  with sent(server, b'{"prom', length=100) as connection:
    answer = rest(connection)
  assert answer.startswith(b'HTTP/1.1 408 ')
  assert b'request_timeout' in answer


def test_a_body_byte_by_byte_is_408(server):
  with sent(server, b'', length=100) as connection:
    begin, answer = time.monotonic(), b''
    connection.settimeout(0.02)
    while not answer and time.monotonic() - begin < 3:
      connection.sendall(b' ')
      try:
        answer = connection.recv(1 << 16)
      except TimeoutError:
        continue
  assert answer.startswith(b'HTTP/1.1 408 ')
  assert time.monotonic() - begin < 3 * SHORT


def test_headers_byte_by_byte_end_the_connection(server):
  """uvicorn alone would wait for ever."""

  def is_open():
    try:
      return bool(connection.recv(1))
    except TimeoutError:
      return True
    except ConnectionError:
      return False

  with server.socket() as connection:
    begin = time.monotonic()
    connection.settimeout(0.02)
    for byte in b'GET /health HTTP/1.1\r\nx: ' + b'a' * 1000:
      connection.sendall(bytes([byte]))
      if not is_open():
        break
  assert SHORT / 2 < time.monotonic() - begin < 4 * SHORT


def test_silence_ends_the_connection(server):
  with server.socket() as connection:
    begin = time.monotonic()
    assert rest(connection) == b''
  assert time.monotonic() - begin < 4 * SHORT


def test_a_second_request_has_its_time_too(server):
  with server.socket() as connection:
    connection.sendall(b'GET /health HTTP/1.1\r\nhost: x\r\n\r\n')
    up_to(connection, b'ready')
    # Longer than one request may take: it is idle, which is uvicorn's to end.
    time.sleep(2 * SHORT)
    connection.sendall(b'GET /health HTTP/1.1\r\nhost: x\r\n\r\n')
    up_to(connection, b'ready')
    begin = time.monotonic()
    connection.sendall(b'GET /heal')
    assert rest(connection) == b''
  assert time.monotonic() - begin < 4 * SHORT


def test_a_long_answer_is_not_a_late_request(server):
  body = {'prompt': 'a', 'max_tokens': 120, 'stream': True}
  begin = time.monotonic()
  status, _, content = server.request('POST', TEXT, body)
  assert time.monotonic() - begin > SHORT
  assert status == 200
  assert content.endswith(b'[DONE]\n\n')


def test_too_large_a_body_is_refused_before_it_is_read(server):
  with sent(server, b'{', length=1001) as connection:
    begin = time.monotonic()
    answer = up_to(connection, b'}}')
  assert answer.startswith(b'HTTP/1.1 413 ')
  assert b'at most 1,000 bytes' in answer
  assert b'larger --body-mib' in answer
  assert time.monotonic() - begin < SHORT


def test_a_body_without_length_is_counted(server):
  with server.socket() as connection:
    connection.sendall(
      f'POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n'
      'transfer-encoding: chunked\r\n\r\n'.encode()
    )
    for _ in range(3):
      connection.sendall(b'190\r\n' + b' ' * 400 + b'\r\n')
    assert connection.recv(1 << 16).startswith(b'HTTP/1.1 413 ')


def test_who_reads_nothing_is_cut_off():
  engine = FakeEngine(limit=20_000, slots=8)
  with running(engine, protocol=Narrow) as server:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(('127.0.0.1', server.port))
    body = json.dumps(
      {
        'prompt': 'a',
        'max_tokens': 19_000,
        'stream': True,
        'logprobs': 20,
        'n': 8,
      }
    ).encode()
    connection.sendall(
      f'POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n'
      f'content-length: {len(body)}\r\n\r\n'.encode()
      + body
    )
    until(lambda: engine.stats().running == 8)
    until(lambda: engine.stats().cancelled.get('running') == 8, 10)
    assert engine.stats().generation_tokens < 8 * 19_000
    assert server.get('/health')[0] == 200
    connection.close()


def test_a_request_has_an_end():
  """In all, whatever its max_tokens."""
  body = {'prompt': 'a', 'max_tokens': 4000}
  engine = FakeEngine(delay=0.005, limit=4096)
  with running(engine, limits=Limits(request_seconds=0.1)) as server:
    status, headers, content = server.request('POST', TEXT, body)
    assert status == 504
    assert json.loads(content)['error']['code'] == 'time_limit'
    assert headers['x-should-retry'] == 'false'
    frames = server.request('POST', TEXT, body | {'stream': True})[2]
    assert frames.split(b'\n\n')[-2].startswith(b'data: {"error":{')
    assert b'[DONE]' not in frames
    server.until_idle(1.0)


def test_silence_is_commented(monkeypatch):
  """Proxies close a stream on which nothing comes."""
  monkeypatch.setattr(answers, 'QUIET_SECONDS', 0.1)
  with running(FakeEngine(delay=0.25)) as server:
    body = {'prompt': 'a', 'max_tokens': 2, 'temperature': 0, 'stream': True}
    content = server.request('POST', TEXT, body)[2]
    frames = content.split(b'\n\n')
    assert frames.count(b': waiting') >= 1
    assert frames[-2] == b'data: [DONE]'
    client = openai.OpenAI(base_url=f'{server.url}/v1', api_key='none')
    parts = client.completions.create(
      model=NAME, prompt='a', max_tokens=2, temperature=0, stream=True
    )
    assert ''.join(part.choices[0].text for part in parts) == 'aa'


def test_small_answers_are_sent_at_once():
  """Or the second write of an answer waits for the first's acknowledgement."""
  found = []

  class Seen(Protocol):
    def connection_made(self, transport):
      super().connection_made(transport)
      kernel = transport.get_extra_info('socket')
      found.append(kernel.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

  with running(protocol=Seen) as server:
    assert server.get('/health')[0] == 200
  assert found == [1]


def test_connections_are_counted(server):
  held = [server.socket() for _ in range(Quick.most_connections)]
  status, _, content = server.request('GET', '/health')
  assert status == 503
  assert 'connections' in json.loads(content)['error']['message']
  for connection in held:
    connection.close()
  until(lambda: server.get('/health')[0] == 200)


def test_half_a_connection_is_none(server):
  with sent(server, {'prompt': 'a', 'max_tokens': 4000}) as connection:
    until(lambda: server.engine.stats().running == 1)
    connection.shutdown(socket.SHUT_WR)
    until(lambda: server.engine.stats().running == 0, 1.0)
