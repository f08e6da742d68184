# SPDX-License-Identifier: Apache-2.0
"""Many clients at once: each request ends once, and with its own text."""

import json
import pathlib
import random
import threading
import time

import pytest
from fake_engine import FakeEngine
from running import running

TEXT = '/v1/completions'


class Crowd:
  """Clients that ask, leave early, and come again when they are refused."""

  def __init__(self, server):
    self.server = server
    self.outcomes = []
    self.wrong = []

  def run(self, num_clients, num_requests):
    numbers = iter(range(num_requests))
    lock = threading.Lock()

    def client():
      while True:
        with lock:
          number = next(numbers, None)
        if number is None:
          return
        try:
          self.outcomes.append(self.ask(number))
        except Exception as error:
          self.wrong.append((number, repr(error)))

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()

  def ask(self, number):
    """One request, whose text is known: its prompt again and again."""
    chance = random.Random(number)
    prompt = f'<{number}>'
    body = {
      'prompt': prompt,
      'max_tokens': chance.randint(1, 30),
      'temperature': 0,
      'stream': chance.random() < 0.5,
    }
    leaves = chance.random() < 0.3
    while True:
      connection = self.server.connection()
      headers = {'content-type': 'application/json'}
      connection.request('POST', TEXT, json.dumps(body), headers)
      if leaves:
        time.sleep(chance.random() * 0.01)
        connection.close()
        return 'left'
      answer = connection.getresponse()
      content = answer.read().decode()
      connection.close()
      if answer.status == 429:
        time.sleep(0.02 * chance.random())
        continue
      assert answer.status == 200, content
      text = self.text_of(content, body['stream'])
      assert text == (prompt * 30)[: body['max_tokens']], (number, text)
      return 'whole'

  def text_of(self, content, is_stream):
    if not is_stream:
      return json.loads(content)['choices'][0]['text']
    *frames, done, _ = content.split('\n\n')
    assert done == 'data: [DONE]'
    choices = [json.loads(f.removeprefix('data: '))['choices'] for f in frames]
    finishes = [choice['finish_reason'] for (choice,) in choices]
    assert finishes[-1] == 'length'
    assert not any(finishes[:-1])
    return ''.join(choice['text'] for (choice,) in choices)


def check(server, crowd, num_requests):
  assert crowd.wrong == []
  assert len(crowd.outcomes) == num_requests
  stats = server.until_idle()
  engine = server.engine
  # Each that was taken has ended, once.
  assert sum(stats.finished.values()) == len(engine.seen)
  assert stats.finished['length'] >= crowd.outcomes.count('whole')
  # The loop may still be at the last of them.
  end = time.monotonic() + 5
  while server.service.delivery._queues and time.monotonic() < end:
    time.sleep(0.01)
  assert not server.service.delivery._queues
  assert not stats.running
  assert not stats.waiting


def test_a_few_clients():
  with running(FakeEngine(delay=0.001)) as server:
    crowd = Crowd(server)
    crowd.run(8, 80)
    check(server, crowd, 80)


def memory():
  """Bytes that this process holds."""
  status = pathlib.Path('/proc/self/status').read_text()
  (line,) = [x for x in status.splitlines() if x.startswith('VmRSS:')]
  return int(line.split()[1]) * 1024


@pytest.mark.slow
def test_sixty_four_clients_and_two_thousand_requests():
  with running(FakeEngine(slots=8)) as server:
    Crowd(server).run(64, 500)
    before = memory()
    crowd = Crowd(server)
    server.engine.seen.clear()
    server.engine.finished.clear()
    crowd.run(64, 2000)
    check(server, crowd, 2000)
    # What the engine that has no model remembers of each job is not ours.
    assert memory() < 1.1 * before + (8 << 20)
