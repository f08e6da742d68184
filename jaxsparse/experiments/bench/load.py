# SPDX-License-Identifier: Apache-2.0
"""Load on a server that speaks OpenAI's protocol, and what came back when.

A closed loop is N users who each ask again when they have their answer: it
cannot overload a server. An open loop asks at random times, at a mean rate,
whatever the server does (Poisson arrivals): it can, and shows where refusals
begin.
"""

import asyncio
import dataclasses
import json
import pathlib
import random
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxsparse.config.errors import UserError, require

# Ids of printable ASCII in a vocabulary of bytes, and there in any other.
_IDS = range(32, 127)


@dataclasses.dataclass(frozen=True)
class Question:
  prompt: tuple[int, ...]
  max_tokens: int


@dataclasses.dataclass
class Answer:
  """Seconds since the load began, and what the answer was."""

  asked: float
  status: int = 0
  # When pieces of text arrived.
  pieces: list[float] = dataclasses.field(default_factory=list)
  ended: float = 0.0
  num_tokens: int = 0
  error: str = ''
  # Bytes, and when they came, until they are read.
  arrived: list[tuple[float, bytes]] = dataclasses.field(default_factory=list)

  @property
  def is_whole(self) -> bool:
    return self.status == 200 and not self.error and bool(self.pieces)


def draw_questions(
  number: int, prompt: str, answer: str, file: str = '', seed: int = 0
) -> list[Question]:
  """Prompts of random tokens.

  Args:
    number: how many.
    prompt: their length, as '64' or, drawn evenly, '16-256'.
    answer: tokens of the answers, likewise.
    file: of lines with both lengths, used in turn in place of these two.
    seed: of lengths and tokens.

  Raises:
    UserError: lengths are not to be read so, or are below 1.
  """
  rng = random.Random(seed)
  if file:
    pairs = _lengths_of(file)
    lengths = [pairs[i % len(pairs)] for i in range(number)]
  else:
    spans = [
      _span('prompt_tokens', prompt), _span('answer_tokens', answer)
    ]  # fmt: skip
    lengths = [
      tuple(rng.randint(*span) for span in spans) for _ in range(number)
    ]
  return [
    Question(tuple(rng.choices(_IDS, k=of_prompt)), of_answer)
    for of_prompt, of_answer in lengths
  ]


def _span(name: str, text: str) -> tuple[int, int]:
  found = re.fullmatch(r'(\d+)(?:-(\d+))?', text.strip())
  first, last = (0, 0)
  if found:
    first, last = int(found[1]), int(found[2] or found[1])
  require(
    1 <= first <= last,
    f"--{name} must be a length such as 64, or two such as '16-256', "
    f'got {text!r}.',
  )
  return first, last


def _lengths_of(file: str) -> list[tuple[int, int]]:
  try:
    text = pathlib.Path(file).expanduser().read_text()
  except (OSError, UnicodeError) as error:
    raise UserError(f"--lengths={file!r} can't be read ({error}).") from error
  rows = [line.split() for line in text.splitlines() if line.strip()]
  for number, row in enumerate(rows, 1):
    is_pair = len(row) == 2 and all(word.isdecimal() for word in row)
    require(
      is_pair and min(map(int, row)) > 0,
      f'--lengths={file!r} must have lines of a length of the prompt and one '
      f'of the answer, such as "64 32"; entry {number} is {" ".join(row)!r}.',
    )
  require(rows, f'--lengths={file!r} has no lengths.')
  return [(int(a), int(b)) for a, b in rows]


class Client:
  """Asks one server; used within `async with`."""

  def __init__(
    self, url: str, model: str, api_key: str = '', is_streamed: bool = True
  ):
    # The commands that ask no server need no client for it.
    import httpx

    headers = {'authorization': f'Bearer {api_key}'} if api_key else {}
    self._model, self._is_streamed = model, is_streamed
    self._http = httpx.AsyncClient(
      base_url=url.rstrip('/'),
      headers=headers,
      timeout=httpx.Timeout(600, connect=5),
      limits=httpx.Limits(max_connections=None),
    )

  async def __aenter__(self) -> 'Client':
    return self

  async def __aexit__(self, *_: object) -> None:
    await self._http.aclose()

  async def ask(self, question: Question, start: float) -> Answer:
    """One answer, timed from `start` on; `all_read` makes sense of it."""
    import httpx

    answer = Answer(time.perf_counter() - start)
    body = dict(
      model=self._model,
      prompt=list(question.prompt),
      max_tokens=question.max_tokens,
      temperature=0,
      ignore_eos=True,
    )
    if self._is_streamed:
      body |= dict(stream=True, stream_options=dict(include_usage=True))
    arrived: list[tuple[float, bytes]] = []
    try:
      async with self._http.stream(
        'POST', '/v1/completions', json=body
      ) as response:
        answer.status = response.status_code
        # Read when all is over: the server may have the same cores.
        async for data in response.aiter_raw():
          arrived.append((time.perf_counter() - start, data))
    except httpx.HTTPError as error:
      answer.error = f'{type(error).__name__}: {error}'
    answer.ended = time.perf_counter() - start
    answer.arrived = arrived
    return answer


def _read(answer: Answer) -> None:
  """Fills in what the bytes of an answer say."""
  arrived, answer.arrived = answer.arrived, []
  if answer.status != 200:
    text = b''.join(data for _, data in arrived).decode(errors='replace')
    answer.error = answer.error or text[:200]
    return
  if arrived and arrived[0][1].startswith(b'{'):
    # An answer that is not streamed.
    arrived = [(arrived[-1][0], b'data: ' + b''.join(d for _, d in arrived))]
    arrived.append((arrived[0][0], b'\n'))
  rest = b''
  for now, data in arrived:
    *lines, rest = (rest + data).split(b'\n')
    for line in lines:
      if line.startswith(b'data: {'):
        try:
          _take(answer, json.loads(line[6:]), now)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
          answer.error = f'{type(error).__name__}: {error}'


def _take(answer: Answer, chunk: dict[str, Any], now: float) -> None:
  if chunk.get('error'):
    answer.error = str(chunk['error'].get('message', chunk['error']))
  if any(choice.get('text') for choice in chunk.get('choices', ())):
    answer.pieces.append(now)
  if chunk.get('usage'):
    answer.num_tokens = chunk['usage']['completion_tokens']


async def closed_loop(
  client: Client, questions: Sequence[Question], num_users: int
) -> list[Answer]:
  """All questions by `num_users` who wait for each answer."""
  left, answers = list(reversed(questions)), []
  start = time.perf_counter()

  async def user() -> None:
    while left:
      answers.append(await client.ask(left.pop(), start))

  await asyncio.gather(*(user() for _ in range(num_users)))
  return all_read(answers)


async def open_loop(
  client: Client, questions: Sequence[Question], rate: float, seed: int = 0
) -> list[Answer]:
  """All questions, `rate` of them a second on average, at random times."""
  rng, tasks = random.Random(seed), []
  start = time.perf_counter()
  due = 0.0
  for question in questions:
    await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
    tasks.append(asyncio.create_task(client.ask(question, start)))
    due += rng.expovariate(rate)
  return all_read(await asyncio.gather(*tasks))


def all_read(answers: Sequence[Answer]) -> list[Answer]:
  """Of what `Client.ask` returned: what its bytes say."""
  for answer in answers:
    _read(answer)
  return list(answers)


def summary(answers: Sequence[Answer]) -> dict[str, Any]:
  """Counts, rates, and 50th, 95th and 99th percentiles in seconds.

  `first` is from the question to the first text, `gap` between pieces of text,
  which are tokens where each is whole characters, `total` to the end. Without
  streams an answer is one piece.
  """
  whole = [a for a in answers if a.is_whole]
  refused = [a for a in answers if a.status == 429]
  others = [a for a in answers if not a.is_whole and a.status != 429]
  seconds = max((a.ended for a in answers), default=0.0)
  tokens = sum(a.num_tokens or len(a.pieces) for a in whole)
  found = dict(
    requests=len(answers),
    whole=len(whole),
    refused=len(refused),
    failed=len(others),
    error=others[0].error if others else '',
    seconds=seconds,
    tokens_per_second=tokens / seconds if seconds else 0.0,
    requests_per_second=len(whole) / seconds if seconds else 0.0,
  )
  times = dict(
    first=[a.pieces[0] - a.asked for a in whole],
    gap=[
      after - before
      for a in whole
      for before, after in zip(a.pieces, a.pieces[1:], strict=False)
    ],
    total=[a.ended - a.asked for a in whole],
  )
  for name, values in times.items():
    for percent in (50, 95, 99):
      value = float(np.percentile(values, percent)) if values else None
      found[f'{name}_p{percent}'] = value
  return found
