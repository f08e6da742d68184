# SPDX-License-Identifier: Apache-2.0
"""serve_ratios: what a server takes beside the same model without one.

  jaxsparse bench serve_ratios --workdir=runs/ultramem_tiny

A `model-server` of the workdir and the model in this process, in turns on the
same cores. Each row is a ratio and what it should be:

throughput    tokens a second of B users who wait for their answers, to a batch
              of B prompts in `generate`; equal lengths, no streams
gap           median time between streamed tokens at full slots, to a decode
              step
first         median time to the first token of an idle server, to the programs
              that read one chunk and decode one token
first, busy   95th percentile at 70 % of the load that it can do, to idle
continuous    tokens a second with answers of unequal length (exponential, a
              third of the longest on average), to batches that wait for theirs
prefix        time to the first token of a prompt whose 8 chunks were read
              before, to one that is new
long prompt   99th percentile between tokens while a prompt of 32 chunks is
              read, to without it
start         seconds to a ready server with compiled programs kept, to without
memory        of the server after all this and --memory_requests more, to after
              its first 100 requests
"""

import argparse
import asyncio
import dataclasses
import pathlib
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jaxsparse.config.errors import require
from jaxsparse.experiments.bench import load, serve
from jaxsparse.experiments.bench.load import Question
from jaxsparse.experiments.bench.serve_offline import Offline

OPTIONS = dict(
  workdir='',
  # B, at once.
  slots=8,
  # Of prompts, answers, and what is read at once.
  prompt_tokens=32,
  answer_tokens=64,
  chunk=32,
  rounds=3,
  memory_requests=2000,
)

_SHORT = 2  # tokens, of answers whose beginning is timed


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """A record of each ratio."""
  require(options.workdir, 'give --workdir of a training run.')
  require(
    0 < options.prompt_tokens <= options.chunk,
    f'--prompt_tokens must be from 1 to --chunk={options.chunk}, got '
    f'{options.prompt_tokens}.',
  )
  length = options.prompt_tokens + options.answer_tokens
  flags = f'--slots={options.slots} --chunk={options.chunk} --max-queue=512'
  short = f'{flags} --max-len={length} --prefix-mib=0'
  long = f'{flags} --max-len={34 * options.chunk + options.answer_tokens}'
  yield _starts(options, short)
  offline = Offline(options.workdir, options.slots, length, options.chunk)
  with serve.server(options.workdir, short) as (url, pid):
    asked = _Asked(url, options)
    asked.closed(asked.questions(100, _SHORT), options.slots)
    first_bytes = _resident_bytes(pid)
    yield from _beside_offline(asked, offline)
    asked.closed(
      asked.questions(options.memory_requests, _SHORT), 2 * options.slots
    )
    yield _row('memory', _resident_bytes(pid), first_bytes, at_most=1.02)
  with serve.server(options.workdir, long) as (url, _):
    asked = _Asked(url, options)
    asked.closed(asked.questions(options.slots, _SHORT), options.slots)
    yield _prefix(asked)
    yield _long_prompt(asked)


def show(records: list[dict[str, Any]]) -> None:
  record = records[-1]
  if len(records) == 1:
    print(f'{"figure":<14}{"this":>14}{"to":>14}{"ratio":>9}{"aim":>12}')
  aim = record['aim']
  sign = '>=' if record['at_least'] else '<='
  print(
    f'{record["figure"]:<14}{record["this"]:>14.4g}{record["to"]:>14.4g}'
    f'{record["ratio"]:>8.2f}x{f"{sign} {aim}":>12}'
    f'{"" if record["holds"] else "  missed"}'
  )


def _row(
  figure: str,
  this: float,
  to: float,
  at_least: float | None = None,
  at_most: float | None = None,
  **more: Any,
) -> dict[str, Any]:
  ratio = this / to
  aim = at_most if at_least is None else at_least
  holds = ratio <= aim if at_least is None else ratio >= aim
  return dict(
    figure=figure, this=this, to=to, ratio=ratio, aim=aim,
    at_least=at_least is not None, holds=holds, **more,
  )  # fmt: skip


class _Asked:
  """Answers of one server."""

  def __init__(self, url: str, options: argparse.Namespace):
    self.options = options
    self._url, self._model, self._seed = url, serve.model_of(url), 0

  def questions(self, number: int, answer: int | str) -> list[Question]:
    """New ones, of prompts of the length of the options."""
    self._seed += 1
    length = str(self.options.prompt_tokens)
    return load.draw_questions(number, length, str(answer), seed=self._seed)

  def closed(
    self,
    questions: Sequence[Question],
    num_users: int,
    is_streamed: bool = True,
  ) -> dict[str, Any]:
    answers = self.run(
      load.closed_loop, questions, num_users, is_streamed=is_streamed
    )
    return load.summary(answers)

  def opened(
    self, questions: Sequence[Question], rate: float
  ) -> dict[str, Any]:
    return load.summary(self.run(load.open_loop, questions, rate))

  def run(
    self, loop, questions, *arguments, is_streamed=True
  ) -> list[load.Answer]:
    async def run() -> list[load.Answer]:
      async with load.Client(
        self._url, self._model, is_streamed=is_streamed
      ) as client:
        return await loop(client, questions, *arguments)

    answers = asyncio.run(run())
    failed = [a for a in answers if not a.is_whole]
    require(
      not failed,
      f'{len(failed)} of {len(answers)} requests failed: '
      f'{failed and failed[0].error}',
    )
    return answers


def _beside_offline(
  asked: _Asked, offline: Offline
) -> Iterator[dict[str, Any]]:
  options, slots = asked.options, asked.options.slots
  full = asked.questions(2 * slots, options.answer_tokens)
  rng, longest = random.Random(0), options.answer_tokens
  uneven = [
    dataclasses.replace(
      question, max_tokens=min(longest, 1 + int(rng.expovariate(3 / longest)))
    )
    for question in asked.questions(12 * slots, longest)
  ]
  loops = dict(throughput=full, continuous=uneven)
  for questions in loops.values():
    offline.batches(questions)  # Compiles.
  names = (*loops, 'streams', 'first', 'step', 'chunk')
  found = {name: [] for name in names}
  for _ in range(options.rounds):
    for name, questions in loops.items():
      served = asked.closed(questions, slots, is_streamed=False)
      seconds = offline.batches(questions)
      tokens = sum(q.max_tokens for q in questions)
      found[name].append((served, tokens / seconds))
    found['streams'].append(asked.closed(full, slots))
    found['first'].append(asked.closed(asked.questions(20, _SHORT), 1))
    found['step'].append(offline.step(options.answer_tokens))
    found['chunk'].append(offline.chunk(20))

  def median(values: Iterator[float]) -> float:
    return statistics.median(values)

  for name, aim in (('throughput', 0.85), ('continuous', 1.5)):
    yield _row(
      name,
      median(served['tokens_per_second'] for served, _ in found[name]),
      median(rate for _, rate in found[name]),
      at_least=aim,
    )
  step = median(found['step'])
  gap = median(served['gap_p50'] for served in found['streams'])
  yield _row('gap', gap, step, at_most=1.15)
  first = median(found['first'][i]['first_p50'] for i in range(options.rounds))
  yield _row('first', first, median(found['chunk']) + step, at_most=1.5)
  idle = median(found['first'][i]['first_p95'] for i in range(options.rounds))
  best = median(served['requests_per_second'] for served in found['streams'])
  busy = asked.opened(asked.questions(40, options.answer_tokens), 0.7 * best)
  yield _row('first, busy', busy['first_p95'], idle, at_most=4)


def _prefix(asked: _Asked) -> dict[str, Any]:
  times = {'new': [], 'read before': []}
  for i in range(6):
    length = str(8 * asked.options.chunk + 1)
    (question,) = load.draw_questions(1, length, str(_SHORT), seed=1000 + i)
    for values in times.values():
      (answer,) = asked.run(load.closed_loop, [question], 1)
      values.append(answer.pieces[0] - answer.asked)
  this, to = (statistics.median(times[name]) for name in ('read before', 'new'))
  return _row('prefix', this, to, at_most=0.3)


def _long_prompt(asked: _Asked) -> dict[str, Any]:
  """Streams alone, then the same while long prompts are read."""
  options = asked.options
  users = max(1, options.slots - 1)
  gaps = {}
  for name, number in (('alone', 0), ('beside', 1)):

    async def loop(client, questions, number=number):
      start = time.perf_counter()
      others = [
        asyncio.create_task(client.ask(q, start)) for q in questions[:-1]
      ]
      # When they are all under way.
      await asyncio.sleep(0.2)
      for _ in range(number):
        others.append(asyncio.create_task(client.ask(questions[-1], start)))
      return load.all_read(await asyncio.gather(*others))

    questions = asked.questions(users, options.answer_tokens)
    length = str(32 * options.chunk + 1)
    questions += load.draw_questions(1, length, str(_SHORT), seed=7)
    answers = asked.run(loop, questions)[:users]
    gaps[name] = load.summary(answers)['gap_p99']
  return _row('long prompt', gaps['beside'], gaps['alone'], at_most=3)


def _starts(options: argparse.Namespace, flags: str) -> dict[str, Any]:
  seconds = []
  with tempfile.TemporaryDirectory() as home:
    for _ in range(2):
      start = time.perf_counter()
      # Where compiled programs are kept.
      with serve.server(options.workdir, flags, dict(HOME=home)):
        seconds.append(time.perf_counter() - start)
  return _row('start', seconds[1], seconds[0], at_most=0.4)


def _resident_bytes(pid: int) -> int:
  """Memory of a process; Linux."""
  for line in pathlib.Path(f'/proc/{pid}/status').read_text().splitlines():
    if line.startswith('VmRSS:'):
      return int(line.split()[1]) * 1024
  raise ValueError(f'/proc/{pid}/status has no VmRSS.')
