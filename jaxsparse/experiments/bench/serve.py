# SPDX-License-Identifier: Apache-2.0
"""serve: a server of OpenAI's protocol under load: how soon, how much, refused.

  jaxsparse bench serve --workdir=runs/ultramem_tiny --json=serve.json
  jaxsparse bench serve --url=http://127.0.0.1:8080 --users=1,8 --rates=

With --workdir it starts a `model-server` of its own, on a free port. First
closed loops: so many users, each of whom asks again when the answer is there.
Then open loops: so many questions a second at random times (Poisson arrivals),
at shares of the rate that the closed loops reached, up to more than the server
can do: the picture shows the time to the first text against the load, and where
refusals (429) begin. Lengths are fixed ('64'), drawn evenly ('16-256'), or
lines of a file, "PROMPT ANSWER" in tokens.

The load is made by one process on the same machine, unless the URL is another
one's: on few cores it takes its share of them.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, TextIO

from jaxsparse.config.errors import UserError, require
from jaxsparse.experiments.bench import load
from jaxsparse.experiments.bench.serve_picture import plot_load

OPTIONS = dict(
  # A server's address, or the workdir of which one is started.
  url='',
  workdir='',
  # By default what the server has.
  model='',
  # Closed loops, and requests in each for each user.
  users='1,4,16',
  requests_per_user=8,
  # Open loops: shares of the best closed loop's requests a second, and how many
  # requests each has.
  rates='0.25,0.5,0.7,0.9,1.2,2',
  requests=100,
  prompt_tokens='64',
  answer_tokens='32',
  lengths='',
  seed=0,
  # Flags for the server that is started, as in a shell.
  flags='',
  # PNG of latency against load; '' for none.
  picture='',
)

_STARTED = 600  # seconds until a server must be ready


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """A record of each loop."""
  require(
    bool(options.url) != bool(options.workdir),
    'give --url of a server or --workdir of which to start one, '
    f'got --url={options.url!r} and --workdir={options.workdir!r}.',
  )
  require(
    importlib.util.find_spec('httpx'),
    "bench serve needs httpx: pip install 'jaxsparse[serve]'.",
  )
  users = _numbers('users', options.users, int)
  shares = _numbers('rates', options.rates, float)
  require(users or shares, '--users and --rates are both empty.')
  require(
    users or not shares,
    '--rates are shares of what the closed loops reach: --users must not be '
    'empty.',
  )
  load.draw_questions(
    1, options.prompt_tokens, options.answer_tokens, options.lengths
  )
  with contextlib.ExitStack() as stack:
    url = options.url
    if options.workdir:
      url, _ = stack.enter_context(server(options.workdir, options.flags))
    model = options.model or model_of(url)
    # What the first requests find cold is no figure of a load.
    _run(url, model, options, load.closed_loop, 4, 2)
    best, records = 0.0, []
    for number in users:
      count = max(number * options.requests_per_user, 8)
      answers = _run(url, model, options, load.closed_loop, count, number)
      record = dict(loop='closed', users=number) | load.summary(answers)
      best = max(best, record['requests_per_second'])
      records.append(record)
      yield record
    for share in shares:
      rate = share * best
      answers = _run(
        url, model, options, load.open_loop, options.requests, rate
      )
      record = dict(loop='open', share=share, rate=rate)
      record |= load.summary(answers)
      records.append(record)
      yield record
  if options.picture:
    plot_load(records, options.picture)
    print(f'Picture: {options.picture}')


def show(records: list[dict[str, Any]]) -> None:
  record = records[-1]
  if len(records) == 1:
    print(
      f'{"load":<24}{"tokens/s":>10}{"req/s":>8}'
      f'{"first p50":>12}{"p95":>9}{"p99":>9}{"gap p50":>11}{"p99":>9}'
      f'{"total p50":>12}{"refused":>9}{"failed":>8}'
    )
  name = f'{record["rate"]:.2f} a second' if record['loop'] == 'open' else ''
  name = name or f'{record["users"]} users'

  def ms(key: str, width: int) -> str:
    value = record[key]
    return f'{"-" if value is None else f"{value * 1e3:.0f} ms":>{width}}'

  print(
    f'{record["loop"] + ", " + name:<24}{record["tokens_per_second"]:>10.1f}'
    f'{record["requests_per_second"]:>8.2f}{ms("first_p50", 12)}'
    f'{ms("first_p95", 9)}{ms("first_p99", 9)}{ms("gap_p50", 11)}'
    f'{ms("gap_p99", 9)}{ms("total_p50", 12)}{record["refused"]:>9}'
    f'{record["failed"]:>8}'
  )
  if record['error']:
    print(f'  one that failed: {record["error"]}')


@contextlib.contextmanager
def server(
  workdir: str, flags: str = '', environment: dict[str, str] | None = None
) -> Iterator[tuple[str, int]]:
  """URL and process id of a `model-server`, stopped at the end of the block.

  Args:
    workdir: of a training run.
    flags: more of them, as in a shell.
    environment: variables beside those of this process.
  """
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  url = f'http://127.0.0.1:{port}'
  # A line for each request, which would hide the rows.
  with tempfile.TemporaryFile('w+') as log:
    process = subprocess.Popen(
      [
        *(sys.executable, '-m', 'jaxsparse.serving'),
        *(f'--model-path={workdir}', f'--port={port}'),
        *shlex.split(flags),
      ],
      stdout=log,
      stderr=log,
      env=os.environ | (environment or {}),
    )
    try:
      _await_ready(url, process, log)
      yield url, process.pid
    finally:
      if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
          process.wait(60)
        except subprocess.TimeoutExpired:
          process.kill()
          process.wait()


def _await_ready(url: str, process: subprocess.Popen, log: TextIO) -> None:
  start = time.perf_counter()
  while time.perf_counter() - start < _STARTED:
    if process.poll() is not None:
      log.seek(0)
      last = log.read().strip().splitlines()[-1:]
      raise UserError(
        f'the server ended with {process.returncode}: {"".join(last)}'
      )
    with contextlib.suppress(OSError):
      urllib.request.urlopen(f'{url}/health', timeout=5).close()
      return
    time.sleep(0.1)
  raise UserError(f'the server at {url} was not ready in {_STARTED} seconds.')


def model_of(url: str) -> str:
  try:
    with urllib.request.urlopen(f'{url.rstrip("/")}/v1/models') as response:
      return json.load(response)['data'][0]['id']
  except (OSError, ValueError, LookupError) as error:
    raise UserError(
      f"--url={url!r} doesn't say its models at /v1/models "
      f'({type(error).__name__}: {error}): give --model.'
    ) from error


def _run(url, model, options, loop, number, argument) -> list[load.Answer]:
  questions = load.draw_questions(
    number,
    options.prompt_tokens,
    options.answer_tokens,
    options.lengths,
    options.seed,
  )

  async def run() -> list[load.Answer]:
    key = os.environ.get('OPENAI_API_KEY', '')
    async with load.Client(url, model, key) as client:
      return await loop(client, questions, argument)

  return asyncio.run(run())


def _numbers(name: str, text: str, kind: type) -> list:
  try:
    numbers = [kind(word) for word in text.split(',') if word.strip()]
  except ValueError:
    numbers = [0]
  require(
    all(n > 0 for n in numbers),
    f'--{name} must be numbers above 0 with commas between, got {text!r}.',
  )
  return numbers
