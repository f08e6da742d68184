# SPDX-License-Identifier: Apache-2.0
"""A trained model in 8 or 4 bits: jaxsparse quantize WORKDIR --out=NEW."""

import argparse
import dataclasses
import math
from typing import Any

import numpy as np

from jaxsparse.config import Config
from jaxsparse.config.errors import require
from jaxsparse.data import tokenizer_roles
from jaxsparse.data.tokenizer import load_from_workdir
from jaxsparse.evaluation.scorer import Scorer
from jaxsparse.inference import adapters, quantized_leaves
from jaxsparse.inference.calibration import quantize_by_text, windows
from jaxsparse.inference.quantize import (
  Quantization,
  bytes_by_part,
  parse,
  quantize,
)
from jaxsparse.inference.text import read_file
from jaxsparse.run import new_workdir, run_config, trained
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.command_line import Parser

# Of a calibration's text: more change little.
_MOST_SEQUENCES = 128


def parse_arguments(argv: list[str]) -> argparse.Namespace:
  parser = Parser(
    prog='jaxsparse quantize',
    description='Store a trained model in 8 or 4 bits a number. All commands '
    'but train read the new workdir.',
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add: Any = parser.add_argument
  add('workdir', help='of the trained model')
  add(
    '--out',
    required=True,
    default=argparse.SUPPRESS,
    help='folder of the new workdir',
  )
  add('--weights', default='', help='of matrices: int8, int4 or nf4')
  add('--tables', default='', help='of tables: int8, int4 or float8')
  add('--group', default='32', help='numbers of int4 and nf4 with one scale: '
      '32 or 64')  # fmt: skip
  add(
    '--clip_search',
    action='store_true',
    help='cut int4 rows of tables off where their error is less for it',
  )
  add('--calibrate', default='', help='a file: round int4 matrices by what '
      'its text feeds them')  # fmt: skip
  add('--text', default='', help='a file: say the bits per byte of it, before '
      'and after')  # fmt: skip
  add(
    '--step',
    type=trained.to_step,
    help='checkpoint to read, or "best"; %(default)s: the newest',
  )
  arguments = parser.parse_args(argv)
  for name in ('workdir', 'out', 'text', 'calibrate'):
    path = getattr(arguments, name)
    setattr(arguments, name, workdir_lib.expanded(path))
  return arguments


def main(argv: list[str]) -> None:
  """Writes the quantized model to a new workdir.

  Raises:
    UserError: a flag is wrong, a file can't be read or written, or the model is
      quantized already.
  """
  arguments = parse_arguments(argv)
  how = _how(arguments)
  text = ''
  if arguments.text:
    text = read_file('--text=', arguments.text)
    require(bool(text), '--text must hold some text, but it is empty.')
  config = run_config.read(arguments.workdir)
  config = _with_vocabulary(config, arguments.workdir)
  rows = _calibration(arguments, config, how)
  step = trained.step_of(arguments.workdir, arguments.step)
  new_workdir.require_new(arguments.out, '--out')
  with new_workdir.emptied_on_failure(arguments.out):
    step, params = adapters.load_params(arguments.workdir, step)
    if arguments.calibrate:
      done = quantize_by_text(config.model, params, how, rows)
    else:
      done = quantize(config.model, params, how)
    plain, kinds = quantized_leaves.plain(done)
    tokenizer_roles.copy_tokenizer(arguments.workdir, arguments.out)
    origin = dict(
      workdir=arguments.workdir, step=step, quantized=dataclasses.asdict(how)
    )
    new_workdir.write(arguments.out, config, plain, origin, kinds)
  for line in _table(bytes_by_part(params), bytes_by_part(done)):
    print(line)
  if text:
    print(_cost(config, arguments, text, params, done))
  print(f'{arguments.out} holds the quantized model of step {step}.')


def _how(arguments: argparse.Namespace) -> Quantization:
  flags = dict(
    weights=arguments.weights, tables=arguments.tables, group=arguments.group
  )
  entries = [f'{name}={value}' for name, value in flags.items() if value]
  if arguments.clip_search:
    entries.append('clip_search=true')
  how = parse(','.join(entries), name='')
  require(
    bool(how), 'give --weights=, --tables= or both: else nothing is quantized.'
  )
  return how


def _calibration(arguments, config, how) -> np.ndarray | None:
  """Sequences of the calibration's text."""
  if not arguments.calibrate:
    return None
  require(
    how.weights == 'int4',
    f'--calibrate is for --weights=int4, got {how.weights or "none"}.',
  )
  text = read_file('--calibrate=', arguments.calibrate)
  tokenizer = load_from_workdir(arguments.workdir)
  rows = windows(tokenizer, text, config.data.seq_len, '--calibrate')
  return rows[:_MOST_SEQUENCES]


def _with_vocabulary(config: Config, workdir: str) -> Config:
  if config.model.vocab_size:
    return config
  model = config.model.with_vocabulary(load_from_workdir(workdir).vocab_size)
  return dataclasses.replace(config, model=model)


def _table(before: dict[str, int], after: dict[str, int]) -> list[str]:
  """Lines about the bytes of each part."""
  names = sorted(before, key=before.__getitem__, reverse=True)
  sizes = [(name, before[name], after[name]) for name in names]
  sizes.append(('all', sum(before.values()), sum(after.values())))
  lines = [f'{"part":<22}{"MB before":>12}{"MB after":>12}{"share":>8}']
  return lines + [
    f'{name:<22}{old / 1e6:>12,.2f}{new / 1e6:>12,.2f}{new / old:>8.2f}'
    for name, old, new in sizes
  ]


def _cost(config, arguments, text, params, done) -> str:
  tokenizer = load_from_workdir(arguments.workdir)
  before, after = (
    -Scorer(config.model, x, tokenizer, config.data.seq_len).rolling([text])[0]
    / (math.log(2) * len(text.encode()))
    for x in (params, done)
  )
  return (
    f'{before:.4f} bits per byte before and {after:.4f} after '
    f'({after - before:+.4f}) of {arguments.text}.'
  )
