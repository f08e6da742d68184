# SPDX-License-Identifier: Apache-2.0
"""Signals and faults end the process; its code says how."""

import http.client
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

FOLDER = pathlib.Path(__file__).parent
TEXT = '/v1/completions'

# Has imported all that a server needs, and becomes one in each child: reads
# what to run, where to write, or whom to wait for; prints pids and codes.
NURSERY = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from fake_engine import FakeEngine
from jaxsparse.config.errors import UserError
from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.run.command_line import user_errors_end_in_a_sentence
from jaxsparse.serving.serve import listen, serve
from jaxsparse.serving.service import Service

def run(options, fault, port, file):
  os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), 2)
  # Slow enough to be interrupted.
  engine = FakeEngine(slots=2, delay=0.02, **options)
  service = Service(engine, ByteTokenizer(), name='tiny', vocab_size=257)
  listener = listen('127.0.0.1', port)
  print(listener.getsockname()[1], file=sys.stderr, flush=True)
  if fault:
    import threading
    timer = threading.Timer(0.3, setattr, (engine, 'fault', eval(fault)))
    timer.start()
  with user_errors_end_in_a_sentence():
    serve(service, listener, drain_seconds=5)

for line in sys.stdin:
  what = json.loads(line)
  if isinstance(what, int):
    print(os.waitstatus_to_exitcode(os.waitpid(what, 0)[1]), flush=True)
  elif pid := os.fork():
    print(pid, flush=True)
  else:
    run(**what)
    sys.exit(0)
"""


@pytest.fixture(scope='module')
def nursery():
  process = subprocess.Popen(
    [sys.executable, '-c', NURSERY, str(FOLDER)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env=os.environ | {'PYTHONPATH': str(FOLDER.parents[1])},
    text=True,
  )

  def ask(what):
    process.stdin.write(json.dumps(what) + '\n')
    process.stdin.flush()
    return int(process.stdout.readline())

  yield ask
  process.stdin.close()
  process.wait(10)


class Process:
  """A server in a process of its own."""

  def __init__(self, nursery, file, options=None, fault='', port=0):
    self._nursery, self._file = nursery, file
    what = dict(options=options or {}, fault=fault, port=port, file=str(file))
    self.pid = nursery(what)
    self.ended = None
    end = time.monotonic() + 20
    while time.monotonic() < end:
      try:
        self.port = int(file.read_text().split('\n')[0])
        self.ask('GET', '/health')
        return
      except (OSError, ValueError):
        time.sleep(0.01)
    raise AssertionError(self.said())

  def said(self):
    return self._file.read_text()

  def signal(self, number):
    os.kill(self.pid, number)

  def ask(self, method, path, body=None):
    """Status and JSON."""
    connection = http.client.HTTPConnection('127.0.0.1', self.port, timeout=20)
    content = body and json.dumps(body)
    headers = {'content-type': 'application/json'}
    connection.request(method, path, content, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()

  def generate(self, number, **more):
    body = {'prompt': 'a', 'max_tokens': number, 'temperature': 0} | more
    return self.ask('POST', TEXT, body)

  def code(self):
    """Waits for its end."""
    if self.ended is None:
      self.ended = self._nursery(self.pid)
    return self.ended

  def kill(self):
    if self.ended is None:
      self.signal(signal.SIGKILL)
      self.code()


@pytest.fixture
def start(nursery, tmp_path):
  started = []

  def begin(**kwargs):
    started.append(
      Process(nursery, tmp_path / f'said_{len(started)}', **kwargs)
    )
    return started[-1]

  yield begin
  for one in started:
    one.kill()


def in_background(function, *args, **kwargs):
  found = []

  def call():
    try:
      found.append(function(*args, **kwargs))
    except (http.client.HTTPException, OSError) as error:
      found.append(error)

  thread = threading.Thread(target=call)
  thread.start()
  return thread, found


def until(server, what, count):
  """Waits for so many jobs to run or wait."""
  line = f'jaxsparse_num_requests_{what} {count}.0\n'.encode()
  end = time.monotonic() + 5
  while line not in server.ask('GET', '/metrics')[1]:
    assert time.monotonic() < end
    time.sleep(0.005)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_runs(start, number):
  server = start()
  asked = [in_background(server.generate, 40, stream=True)]
  asked.append(in_background(server.generate, 40))
  until(server, 'running', 2)
  # No slot is left for it.
  asked.append(in_background(server.generate, 40))
  until(server, 'waiting', 1)
  server.signal(number)
  time.sleep(0.1)
  # Told, and not refused: a balancer must see it.
  status, content = server.ask('GET', '/health')
  assert status == 503
  assert b'ending' in content
  assert server.generate(1)[0] == 503
  assert server.code() == 0
  for thread, _ in asked:
    thread.join(10)
  found = [answers for _, answers in asked]
  whole = [content for ((status, content),) in found if status == 200]
  assert len(whole) == 2
  assert sum(content.endswith(b'data: [DONE]\n\n') for content in whole) == 1
  assert sum(b'"completion_tokens":40' in content for content in whole) == 1
  assert [status for ((status, _),) in found].count(503) == 1


def test_a_second_signal_ends_at_once(start):
  server = start()
  thread, found = in_background(server.generate, 200)
  until(server, 'running', 1)
  server.signal(signal.SIGTERM)
  time.sleep(0.2)
  assert server.ask('GET', '/health')[0] == 503
  begin = time.monotonic()
  server.signal(signal.SIGTERM)
  assert server.code() == 128 + signal.SIGTERM
  assert time.monotonic() - begin < 1
  thread.join(5)
  assert isinstance(found[0], http.client.RemoteDisconnected)


def test_a_signal_while_it_starts(start):
  server = start(options={'state': 'starting'})
  assert server.ask('GET', '/health')[0] == 503
  server.signal(signal.SIGTERM)
  assert server.code() == 0


def test_an_engine_that_fails_ends_the_process(start):
  server = start(fault='RuntimeError("x")')
  thread, found = in_background(server.generate, 200)
  assert server.code() == 1
  thread.join(10)
  ((status, content),) = found
  assert status == 500
  assert json.loads(content)['error']['code'] == 'server_error'


def test_an_engine_that_can_not_be_made_is_a_sentence(start):
  server = start(fault='UserError("--slots=9 is too many.")')
  assert server.code() == 2
  assert 'error: --slots=9 is too many.\n' in server.said()


def test_a_killed_server_leaves_its_port(start):
  first = start()
  first.kill()
  second = start(port=first.port)
  assert second.port == first.port
  assert second.generate(1)[0] == 200
