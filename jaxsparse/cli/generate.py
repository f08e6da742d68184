# SPDX-License-Identifier: Apache-2.0
"""Continues prompts with a trained model: python -m jaxsparse generate.

The text goes to stdout as it comes, everything else to stderr; of several texts
at once the first one does, and the others when it is complete. Every sample is
added to `samples.jsonl` in the workdir. A prompt from a file may be of any
length: if it exceeds that of training and all attention is sparse or local, the
sparse layers keep a history of bounded size, and memory does not grow with it.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable

from jaxsparse.cli.generate_captions import write_captions
from jaxsparse.config import Config, ModelConfig, tables
from jaxsparse.config.errors import UserError
from jaxsparse.config.model import KV_CACHES
from jaxsparse.data import unknown_words
from jaxsparse.data.tokenizer import load_from_workdir
from jaxsparse.inference import batch, row_cache, weights
from jaxsparse.inference.adapters import add_flags
from jaxsparse.inference.long_input import (
  Reading,
  can_forget,
  with_bounded_history,
)
from jaxsparse.inference.quantize import QUANTIZE_HELP, parse
from jaxsparse.inference.sampling import Sampling
from jaxsparse.inference.text import (
  Completion,
  Request,
  encode_prompt,
  read_file,
)
from jaxsparse.run import (
  compiled_programs,
  run_config,
  trained,
  workdir,
)
from jaxsparse.run.command_line import Once, Parser

# Between two lines about a prompt that is being read.
_SECONDS = 5.0

# Characters of a prompt that the samples' file repeats.
_PROMPT_KEPT = 10_000


def parse_arguments(argv: list[str]) -> argparse.Namespace:
  parser = Parser(
    prog='jaxsparse generate',
    description='Continue a prompt with a model that train.py trained.',
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add(
    '--workdir',
    required=True,
    default=argparse.SUPPRESS,
    help='folder of the training run',
  )
  add(
    '--prompt',
    action='append',
    default=[],
    help='text to continue, of several each; none: a new document',
  )
  add(
    '--prompt_file',
    default='',
    help='a text file to continue instead, of any length',
  )
  add(
    '--history_blocks',
    type=int,
    help='blocks that sparse attention keeps between the first one and its '
    'window; 0 keeps all; %(default)s: all, or with a --prompt_file longer '
    'than the training length what makes up that length',
  )
  add(
    '--kv',
    choices=KV_CACHES,
    help='how keys and values of earlier tokens are kept: exact, or in '
    'int8, in a quarter to half of the memory; %(default)s: as the run has it',
  )
  add(
    '--image',
    action=Once,
    default='',
    metavar='FILE',
    help='a picture to be described, by a model that has learned captions; '
    '--prompt is then what the caption begins with',
  )
  add('--max_tokens', type=int, default=200, help='most tokens to write')
  add(
    '--temperature',
    type=float,
    default=0.8,
    help='divides the logits; 0 always takes the likeliest token',
  )
  add('--top_k', type=int, default=0, help='k likeliest tokens only; 0: all')
  add(
    '--top_p',
    type=float,
    default=1.0,
    help='likeliest tokens with this probability together only; 1: all',
  )
  add('--seed', type=int, default=0, help='same seed, same text')
  add(
    '--stop',
    action='append',
    default=[],
    help='end before this string; of several --stop before the first to appear',
  )
  add(
    '--num_samples',
    type=int,
    default=1,
    help='texts to write; sample i has the seed --seed + i',
  )
  add(
    '--step',
    type=trained.to_step,
    help='checkpoint to read, or "best": the one of the lowest validation '
    'loss; %(default)s: the newest',
  )
  add(
    '--tables',
    choices=tables.STORES,
    default='',
    help='where the tables of memory layers lie: on the device, in host '
    'memory, or in mapped files, which take no memory; %(default)s: as the run '
    'has them',
  )
  add('--row_cache', default='', metavar='ROWS|SIZE', help=row_cache.HELP)
  add('--quantize', default='', metavar='HOW', help=QUANTIZE_HELP)
  add_flags(parser)
  arguments = parser.parse_args(argv)
  arguments.workdir = workdir.expanded(arguments.workdir)
  arguments.prompt_file = workdir.expanded(arguments.prompt_file)
  if arguments.num_samples < 1:
    raise UserError(
      f'num_samples must be at least 1, got {arguments.num_samples}.'
    )
  if arguments.seed + arguments.num_samples > 2**32:
    raise UserError(
      f'seed + num_samples must be at most {2**32}, got {arguments.seed} and '
      f'{arguments.num_samples}.'
    )
  if arguments.prompt and arguments.prompt_file:
    raise UserError('give --prompt or --prompt_file, not both.')
  if arguments.history_blocks is not None and arguments.history_blocks < 0:
    raise UserError(
      'history_blocks must be 0 for all blocks, or their number; got '
      f'{arguments.history_blocks}.'
    )
  return arguments


def to_requests(arguments: argparse.Namespace) -> list[Request]:
  """The samples of each prompt in turn.

  Raises:
    UserError: a limit, a prompt or a stop string is not valid, or the file
      can't be read.
  """
  prompts = arguments.prompt or ['']
  if arguments.prompt_file:
    prompts = [read_file('--prompt_file=', arguments.prompt_file)]
  first = Request(
    prompt=prompts[0],
    max_tokens=arguments.max_tokens,
    stop=tuple(arguments.stop),
    sampling=Sampling(
      temperature=arguments.temperature,
      top_k=arguments.top_k,
      top_p=arguments.top_p,
    ),
    seed=arguments.seed,
  )
  return [
    dataclasses.replace(first, prompt=prompt, seed=first.seed + i)
    for prompt in prompts
    for i in range(arguments.num_samples)
  ]


def main(argv: list[str]) -> None:
  arguments = parse_arguments(argv)
  requests = to_requests(arguments)
  quantization = parse(arguments.quantize)
  cached = row_cache.parse(arguments.row_cache, '--row_cache')
  config = run_config.read(
    arguments.workdir, _say, may_see=bool(arguments.image)
  )
  # Not where its config says: the workdir may come from anybody.
  compiled_programs.keep(say=_say)
  if arguments.image:
    write_captions(config, arguments, requests, _write, _say)
    return
  tokenizer = load_from_workdir(arguments.workdir, config.model.vocab_size)
  for prompt in arguments.prompt:
    unknown_words.tell(tokenizer, prompt, '--prompt', _say)
  step = trained.step_of(arguments.workdir, arguments.step)
  num_prompt = max(len(encode_prompt(tokenizer, r.prompt)) for r in requests)
  model = _with_history(config, arguments, num_prompt)
  model = model.with_vocabulary(tokenizer.vocab_size)
  if arguments.kv:
    model = dataclasses.replace(model, kv_cache=arguments.kv)
  step, params = weights.load(
    arguments.workdir,
    model,
    step,
    say=_say,
    how=quantization,
    tables=arguments.tables,
    adapters=arguments.adapter,
    is_forced=arguments.force,
    is_folded=True,
  )
  params = row_cache.begun(params, cached, '--row_cache')
  # Refuses what memory has no room for before a prompt is written.
  programs = batch.prepare(
    model, params, tokenizer, requests, config.data.seq_len
  )
  if not (model.sparse and model.sparse.history_blocks):
    _warn_of_length(config, num_prompt + arguments.max_tokens)

  def keep(request: Request, done: Completion) -> None:
    _report(done)
    _keep(arguments.workdir, to_row(step, request, done))

  in_order = _InOrder(requests, not arguments.prompt_file, keep)
  batch.complete_all(
    programs,
    tokenizer,
    requests,
    in_order.write,
    in_order.finish,
    _Progress(num_prompt),
  )


class _InOrder:
  """Writes texts one after another, the first of them as it comes."""

  def __init__(
    self,
    requests: list[Request],
    has_prompts: bool,
    keep: Callable[[Request, Completion], None],
  ):
    self._requests, self._has_prompts, self._keep = requests, has_prompts, keep
    self._held, self._done = [''] * len(requests), {}
    self._now = 0
    self._begin()

  def _begin(self) -> None:
    text = self._held[self._now]
    if self._has_prompts:
      text = self._requests[self._now].prompt + text
    _write(text if self._now == 0 else '\n\n' + text)

  def write(self, number: int, text: str) -> None:
    if number == self._now:
      _write(text)
    else:
      self._held[number] += text

  def finish(self, number: int, done: Completion) -> None:
    self._done[number] = done
    while self._now in self._done:
      self._keep(self._requests[self._now], self._done[self._now])
      self._now += 1
      if self._now < len(self._requests):
        self._begin()


def _keep(folder: str, row: dict) -> None:
  """Adds a text to the samples, where the workdir can be written."""
  try:
    workdir.append_sample(folder, row)
  except UserError as error:
    _say(f'The sample was not kept: {error}')


def _with_history(
  config: Config, arguments: argparse.Namespace, num_prompt: int
) -> ModelConfig:
  """The model, with the length of its history if it is to forget."""
  model, wanted = config.model, arguments.history_blocks
  if wanted is None:
    is_long = num_prompt + arguments.max_tokens > config.data.seq_len
    if not (arguments.prompt_file and is_long and can_forget(model)):
      return model
  elif wanted == 0:
    return model
  model = with_bounded_history(model, config.data.seq_len, wanted)
  blocks, rows = model.sparse.history_blocks, model.sparse.block
  _say(
    f'Sparse attention keeps {blocks} blocks of {rows} tokens between its '
    'first one and its window.'
  )
  return model


class _Progress:
  """Says now and then how far a long prompt has been read."""

  def __init__(self, num_prompt: int):
    self._num_prompt = num_prompt
    self._restart(0)

  def _restart(self, begin: int) -> None:
    self._begin, self._start, self._nats = begin, time.monotonic(), 0.0

  def __call__(self, reading: Reading) -> None:
    self._nats += reading.nats_per_token * (reading.end - reading.begin)
    seconds = time.monotonic() - self._start
    if seconds < _SECONDS:
      return
    num_tokens = reading.end - self._begin
    _say(
      f'{reading.end:,} of {self._num_prompt:,} tokens read, '
      f'{num_tokens / seconds:,.0f} tokens/s, the last {num_tokens:,} at '
      f'{self._nats / num_tokens:.4f} nats/token'
    )
    self._restart(reading.end)


def to_row(step: int, request: Request, done: Completion) -> dict:
  """What the samples' file says of one text: of a long prompt the end."""
  row = {'step': step, **dataclasses.asdict(request)}
  row['prompt'] = row['prompt'][-_PROMPT_KEPT:]
  return row | {'text': done.text, 'num_tokens': done.num_tokens}


def _warn_of_length(config: Config, length: int) -> None:
  if length > config.data.seq_len:
    _say(
      f'warning: prompt and max_tokens make {length} tokens, more than the '
      f'{config.data.seq_len} of training; what lies beyond may be poor.'
    )


def _report(done: Completion) -> None:
  _write('\n')
  _say(
    f'{done.num_tokens} tokens, {done.tokens_per_second:.1f} tokens/s after '
    f'{done.first_token_seconds:.1f} s to the first one'
  )


def _write(text: str) -> None:
  print(text, end='', flush=True)


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
