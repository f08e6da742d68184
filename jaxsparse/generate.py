"""Continues a prompt with a trained model: python -m jaxsparse.generate.

The text goes to stdout as it comes, everything else to stderr. Every sample is
added to `samples.jsonl` in the workdir.
"""

import argparse
import dataclasses
import os
import sys

from jaxsparse import checkpoint, workdir
from jaxsparse.command_line import (
  keep_compiled_programs,
  user_errors_end_in_a_sentence,
)
from jaxsparse.config import Config
from jaxsparse.data.tokenizer import load_from_workdir
from jaxsparse.errors import UserError
from jaxsparse.inference.sampling import Sampling
from jaxsparse.inference.text import (
  Completion,
  Request,
  complete,
  encode_prompt,
)


class _Parser(argparse.ArgumentParser):
  """One whose complaints are sentences like all others."""

  def error(self, message: str):
    raise UserError(f'{message}; see --help.')


def parse_arguments(argv: list[str]) -> argparse.Namespace:
  parser = _Parser(
    prog='python -m jaxsparse.generate',
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
  add('--prompt', default='', help='text to continue; empty: a new document')
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
  add('--stop', default='', help='end before this string')
  add(
    '--num_samples',
    type=int,
    default=1,
    help='texts to write; sample i has the seed --seed + i',
  )
  add('--step', type=int, help='checkpoint to read; %(default)s: the newest')
  arguments = parser.parse_args(argv)
  if arguments.num_samples < 1:
    raise UserError(
      f'num_samples must be at least 1, got {arguments.num_samples}.'
    )
  return arguments


def to_requests(arguments: argparse.Namespace) -> list[Request]:
  """One request for each sample.

  Raises:
    UserError: a limit, the prompt or the stop string is not valid.
  """
  sampling = Sampling(
    temperature=arguments.temperature,
    top_k=arguments.top_k,
    top_p=arguments.top_p,
  )
  return [
    Request(
      prompt=arguments.prompt,
      max_tokens=arguments.max_tokens,
      stop=arguments.stop,
      sampling=sampling,
      seed=arguments.seed + i,
    )
    for i in range(arguments.num_samples)
  ]


def main(argv: list[str]) -> None:
  with user_errors_end_in_a_sentence():
    arguments = parse_arguments(argv)
    requests = to_requests(arguments)
    config = workdir.read_config(arguments.workdir)
    keep_compiled_programs(config)
    tokenizer = load_from_workdir(arguments.workdir)
    step, params = checkpoint.load_params(arguments.workdir, arguments.step)
    _warn_of_length(config, tokenizer, requests[0])
    for i, request in enumerate(requests):
      if i:
        _write('\n\n')
      _write(request.prompt)
      done = complete(config.model, params, tokenizer, request, _write)
      workdir.append_sample(arguments.workdir, to_row(step, request, done))
      _report(done)


def to_row(step: int, request: Request, done: Completion) -> dict:
  """What the samples' file says of one text."""
  row = {'step': step, **dataclasses.asdict(request)}
  return row | {'text': done.text, 'num_tokens': done.num_tokens}


def _warn_of_length(config: Config, tokenizer, request: Request) -> None:
  num_prompt = len(encode_prompt(tokenizer, request.prompt))
  length = num_prompt + request.max_tokens
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


if __name__ == '__main__':
  # A terminal may not know a character; a hole in the text beats a traceback.
  sys.stdout.reconfigure(errors='replace')
  try:
    main(sys.argv[1:])
  except KeyboardInterrupt:
    sys.exit(130)
  except BrokenPipeError:
    # Whoever reads has enough; Python would complain again while it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
