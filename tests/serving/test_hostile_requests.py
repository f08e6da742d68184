# SPDX-License-Identifier: Apache-2.0
"""What nobody should send gets a sentence, and harms nobody else."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import hostile
import pytest
from fake_engine import FakeEngine
from running import Running, running

from jaxsparse.data.chat_template import ChatTemplate
from jaxsparse.serving.errors import CODES

# A server in a process of its own, which prints its port.
ALONE = """
import sys
sys.path.insert(0, {tests!r})
from running import running
from fake_engine import FakeEngine
from jaxsparse.data.chat_template import ChatTemplate
with running(FakeEngine(), template=ChatTemplate('x')) as server:
  print(server.port, flush=True)
  sys.stdin.read()
"""


# Asks for /health until its input ends; prints seconds and statuses. In a
# process of its own: senders here do not hold it up.
WATCH = """
import http.client, select, sys, time
connection = http.client.HTTPConnection('127.0.0.1', int(sys.argv[1]))
while True:
  begin = time.perf_counter()
  connection.request('GET', '/health')
  answer = connection.getresponse()
  answer.read()
  print(time.perf_counter() - begin, answer.status, flush=True)
  if select.select([sys.stdin], [], [], 0.005)[0]:
    break
"""


@contextlib.contextmanager
def watched(port, longest):
  """Asks for /health all the time, which must never take longer.

  On cores that others use, too, all takes as much longer.
  """
  process = subprocess.Popen(
    [sys.executable, '-c', WATCH, str(port)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  first = process.stdout.readline()
  try:
    yield
  finally:
    process.stdin.close()
    lines = [first, *process.stdout]
    process.wait(10)
  found = [line.split() for line in lines]
  assert {status for _, status in found} == {'200'}
  took = max(float(seconds) for seconds, _ in found)
  print(f'/health: {len(found)} times, longest {took:.3f} s')
  assert took < longest * max(1.0, os.getloadavg()[0] / os.cpu_count())


def check_sentence(status, content):
  if status == 200:
    return
  assert 400 <= status < 500, content
  error = json.loads(content)['error']
  assert error['code'] in CODES
  assert 5 < len(error['message']) < 400
  assert error['message'].endswith('.')
  assert 'Traceback' not in error['message']


def send_all(server, found):
  """Each on the same connection, which an error must not spoil."""
  statuses = []
  connection = server.connection()
  for path, content in found:
    headers = {'content-type': 'application/json'}
    connection.request('POST', path, content, headers)
    answer = connection.getresponse()
    read = answer.read()
    if answer.headers['content-type'] == 'text/event-stream':
      assert read.endswith(b'\n\n')
    else:
      check_sentence(answer.status, read)
    statuses.append(answer.status)
  connection.close()
  return statuses


@pytest.fixture(scope='module')
def server():
  with running(FakeEngine(), template=ChatTemplate('x')) as found:
    yield found


def test_odd_bodies_get_a_sentence(server):
  with watched(server.port, 0.1):
    statuses = send_all(server, hostile.bodies(0, 150))
  assert statuses.count(400) > 75
  server.until_idle()


def test_odd_sockets_get_a_sentence(server):
  with watched(server.port, 0.1):
    for seed in range(40):
      content, half_closes = hostile.raw(seed)
      answer = hostile.poke(server.port, content, half_closes, 0.05)
      assert b' 500 ' not in answer[:20], content[:100]
  server.until_idle()


@pytest.mark.parametrize('content', [hostile.HEAVY[0], hostile.HEAVY[2]])
def test_heavy_bodies_get_a_sentence(server, content):
  (status,) = send_all(server, [(hostile.TEXT, content())])
  assert status in (400, 413)


@pytest.mark.slow
def test_a_thousand_hostile_requests_beside_health():
  """In a process of its own: what is measured is the server alone."""
  folder = pathlib.Path(__file__).parent
  process = subprocess.Popen(
    [sys.executable, '-c', ALONE.format(tests=str(folder))],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env=os.environ | {'PYTHONPATH': str(folder.parents[1])},
    text=True,
  )
  server = Running(None, None, int(process.stdout.readline()))
  try:
    with watched(server.port, 0.1):
      for seed in range(1, 5):
        send_all(server, hostile.bodies(seed, 250))
      for seed in range(200):
        content, half_closes = hostile.raw(seed)
        answer = hostile.poke(server.port, content, half_closes, 0.1)
        assert b' 500 ' not in answer[:20], content[:100]
      for content in hostile.HEAVY:
        (status,) = send_all(server, [(hostile.TEXT, content())])
        assert status in (400, 413)
    assert server.get('/metrics')[0] == 200
    status, body = server.post(hostile.TEXT, {'prompt': 'a', 'max_tokens': 3})
    assert status == 200
    assert body['choices'][0]['text'] == 'aaa'
  finally:
    process.stdin.close()
    process.wait(20)
