# SPDX-License-Identifier: Apache-2.0
"""A server under load: what is counted, timed and refused."""

import asyncio
import http.server
import json
import threading
import time

import pytest
from pictures import figures, texts

from jaxsparse.config.errors import UserError
from jaxsparse.experiments.bench import command, load, serve_picture

GAP = 0.02


class Server(http.server.ThreadingHTTPServer):
  """Answers a piece every `GAP` seconds, and `places` questions at once."""

  daemon_threads = True

  def __init__(self, places):
    super().__init__(('127.0.0.1', 0), Handler)
    self.places, self.most, self.bodies = threading.Semaphore(places), 0, []
    self.url = f'http://127.0.0.1:{self.server_port}'

  def handle_error(self, *_):
    """Clients that leave are no news."""


class Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *_):
    """Nothing is printed."""

  def do_GET(self):
    self._answer(200, json.dumps({'data': [{'id': 'tiny'}]}).encode())

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers['content-length'])))
    self.server.bodies.append(body)
    if not self.server.places.acquire(blocking=False):
      self._answer(429, b'{"error": {"message": "full"}}')
      return
    try:
      count = body['max_tokens']
      pieces = [{'choices': [{'text': 'x'}]}] * count
      usage = {'choices': [], 'usage': {'completion_tokens': count}}
      if 13 in body['prompt']:
        pieces, usage = pieces[:1], {'error': {'message': 'it broke'}}
      self.send_response(200)
      self.end_headers()
      for piece in pieces:
        time.sleep(GAP)
        self._send(json.dumps(piece))
      self._send(json.dumps(usage))
      self._send('[DONE]')
    finally:
      self.server.places.release()

  def _send(self, text):
    self.wfile.write(f'data: {text}\n\n'.encode())
    self.wfile.flush()

  def _answer(self, status, body):
    self.send_response(status)
    self.send_header('content-length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)


@pytest.fixture
def server():
  made = []

  def start(places):
    made.append(Server(places))
    threading.Thread(target=made[-1].serve_forever, daemon=True).start()
    return made[-1]

  yield start
  for one in made:
    one.shutdown()
    one.server_close()


def run(loop, url, questions, argument):
  async def asked():
    async with load.Client(url, 'tiny') as client:
      return await loop(client, questions, argument)

  return asyncio.run(asked())


def test_users_wait_for_their_answers(server):
  one = server(places=2)
  questions = load.draw_questions(6, '3-9', '4')
  found = load.summary(run(load.closed_loop, one.url, questions, 2))
  # Never more than two at once, or there would be refusals.
  assert (found['whole'], found['refused'], found['failed']) == (6, 0, 0)
  assert found['first_p50'] > GAP * 0.9
  assert GAP * 0.5 < found['gap_p50'] < GAP * 20
  assert found['total_p50'] > 4 * GAP * 0.9
  tokens = found['tokens_per_second'] * found['seconds']
  assert tokens == pytest.approx(6 * 4)
  asked = {tuple(body['prompt']) for body in one.bodies}
  assert asked == {question.prompt for question in questions}


def test_an_open_loop_does_not_wait(server):
  one = server(places=1)
  questions = load.draw_questions(8, '3', '5')
  found = load.summary(run(load.open_loop, one.url, questions, 200.0))
  assert found['refused'] > 0
  assert found['whole'] + found['refused'] == 8


def test_an_error_within_a_stream_is_a_failure(server):
  one = server(places=2)
  questions = [load.Question((13,), 3), load.Question((14,), 3)]
  found = load.summary(run(load.closed_loop, one.url, questions, 1))
  assert (found['whole'], found['failed']) == (1, 1)
  assert found['error'] == 'it broke'


def test_questions_have_the_lengths_asked_for(tmp_path):
  drawn = load.draw_questions(50, '3-5', '7', seed=1)
  assert {len(q.prompt) for q in drawn} == {3, 4, 5}
  assert {q.max_tokens for q in drawn} == {7}
  assert drawn == load.draw_questions(50, '3-5', '7', seed=1)
  file = tmp_path / 'lengths'
  file.write_text('4 2\n\n6 3\n')
  read = load.draw_questions(3, '', '', str(file))
  assert [(len(q.prompt), q.max_tokens) for q in read] == [
    (4, 2), (6, 3), (4, 2)
  ]  # fmt: skip


def test_a_run_prints_rows_writes_json_and_draws(
  server, tmp_path, capsys, monkeypatch
):
  drawn = figures(monkeypatch)
  one = server(places=2)
  picture, file = tmp_path / 'load.png', tmp_path / 'load.json'
  flags = '--users=2 --requests_per_user=2 --rates=0.5,4 --requests=6'
  command.main(
    [
      *('serve', f'--url={one.url}', *flags.split(), '--answer_tokens=3'),
      *(f'--picture={picture}', f'--json={file}'),
    ]
  )
  rows = json.loads(file.read_text())['results']
  assert [row['loop'] for row in rows] == ['closed', 'open', 'open']
  assert rows[2]['rate'] == pytest.approx(8 * rows[1]['rate'])
  assert 'closed, 2 users' in capsys.readouterr().out
  (figure,) = drawn
  assert 'first text, p50' in texts(figure)
  assert picture.stat().st_size > 10_000


def test_a_picture_of_nothing_whole_is_drawn(tmp_path):
  serve_picture.plot_load([], tmp_path / 'x.png')
  assert (tmp_path / 'x.png').is_file()


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    ([], 'give --url of a server or --workdir'),
    (['--url=http://x', '--workdir=y'], 'give --url of a server or --workdir'),
    (['--url=http://x', '--users=0'], '--users must be numbers above 0'),
    (['--url=http://x', '--rates=a'], '--rates must be numbers above 0'),
    (['--url=http://x', '--users='], '--users must not be empty'),
    (['--url=http://x', '--prompt_tokens=9-3'], '--prompt_tokens must be'),
    (['--url=http://x', '--lengths=/nosuch'], "--lengths='/nosuch' can't be"),
    (['--url=http://127.0.0.1:9'], "doesn't say its models"),
  ],
)
def test_a_bad_flag_is_a_sentence(flags, words):
  with pytest.raises(UserError, match=words):
    command.main(['serve', *flags])
