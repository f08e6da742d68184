# SPDX-License-Identifier: Apache-2.0
"""Compares architectures at equal budget: `python -m jaxsparse compare`.

  python -m jaxsparse compare --suite=configs/compare/facts.py \\
    --workdir=runs/facts

Derives every architecture's sizes from the suite's budget, trains all of them
on the same batches, seed after seed, evaluates them on the same validation
pass, and writes to the workdir: comparison.json, comparison.md and plots/. The
same command goes on where it was stopped; when nothing is left to train it only
makes table and plots again. With --only, --seeds or --people fewer runs are
trained, and the rest can follow later in the same workdir. A run's checkpoints
go when its result is written; with --keep its folder stays a workdir as of
`jaxsparse train`.
"""

import argparse
import pathlib
from collections.abc import Sequence

from jaxsparse.analysis import budget, cost
from jaxsparse.config.errors import UserError
from jaxsparse.experiments.compare import pictures, report, runs
from jaxsparse.experiments.compare import suite as suite_lib
from jaxsparse.experiments.compare.suite import Suite
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run import workdir_lock
from jaxsparse.run.command_line import Parser
from jaxsparse.run.progress import Reporter


def main(argv: Sequence[str]) -> None:
  options = _parse(argv)
  suite = suite_lib.restrict(
    suite_lib.load(options.suite),
    only=tuple(name for name in options.only.split(',') if name),
    seeds=_numbers('--seeds', options.seeds),
    people=_numbers('--people', options.people),
    num_steps=options.steps,
    text=options.text,
  )
  compare(
    suite,
    workdir_lib.expanded(options.workdir),
    options.dry_run,
    options.keep,
  )


def compare(
  suite: Suite,
  workdir: str,
  is_dry_run: bool = False,
  keeps_models: bool = False,
) -> None:
  """Trains what is missing in the workdir and shows all that is there.

  Args:
    suite: what to compare.
    workdir: made where it is missing.
    is_dry_run: only say what would be trained.
    keeps_models: leave the checkpoints of what is trained.

  Raises:
    UserError: the suite or the workdir does not allow it.
  """
  if workdir_lib.is_remote(workdir):
    raise UserError(f'--workdir={workdir} must be a local folder.')
  reporter = Reporter()
  planned = runs.plan(suite, workdir)
  _say_sizes(planned, reporter.say)
  if is_dry_run:
    reporter.say(f'{len(planned)} runs.')
    return
  with workdir_lock.held(workdir, reporter.say):
    _compare(suite, planned, pathlib.Path(workdir), reporter, keeps_models)


def _compare(
  suite: Suite,
  planned: Sequence[runs.Run],
  folder: pathlib.Path,
  reporter: Reporter,
  keeps_models: bool,
) -> None:
  results, is_stopped = runs.train_all(
    planned,
    reporter,
    lambda done: _write(suite, done, folder),
    keeps_models,
  )
  if is_stopped:
    reporter.say(
      f'{len(results)} of {len(planned)} runs are finished; the same command '
      'goes on from here.'
    )
  if not results:
    return
  reporter.say('\n' + _write(suite, results, folder))
  with workdir_lib.write_errors(folder):
    drawn = pictures.draw(suite, results, folder / 'plots')
  reporter.say(f'\nPlots: {", ".join(map(str, drawn))}')


def _write(suite, results, folder):
  with workdir_lib.write_errors(folder):
    return report.write(suite, results, folder)


def _say_sizes(planned: Sequence[runs.Run], say) -> None:
  named = set()
  for run in planned:
    if run.known or run.architecture in named:
      continue
    named.add(run.architecture)
    parameters = cost.count_parameters(run.config.model)
    flops = cost.forward_flops(run.config.model, run.config.data.seq_len)
    say(
      f'{run.architecture}: {budget.describe(run.config.model)}; '
      f'{parameters.published:,} parameters and {parameters.embedding:,} of '
      f'embeddings, {flops:,} FLOPs per token'
    )


def _numbers(flag: str, text: str) -> tuple[int, ...]:
  try:
    return tuple(int(part) for part in text.split(',') if part)
  except ValueError as error:
    raise UserError(
      f'{flag} must be whole numbers with commas between, got {text!r}.'
    ) from error


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = Parser(
    prog='jaxsparse compare',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('--suite', required=True, help='a file, such as configs/compare/cpu.py')
  add('--workdir', required=True, help="folder of the comparison's runs")
  add(
    '--only', default='', help='architectures or methods, with commas between'
  )
  add('--seeds', default='', help="instead of the suite's, such as 0,1")
  add('--people', default='', help="instead of the suite's (facts)")
  add('--steps', type=int, default=0, help="instead of the suite's")
  add('--text', default='', help='globs of text files, for language suites')
  add('--dry_run', action='store_true', help='say sizes and runs, and end')
  add('--keep', action='store_true', help='leave the trained models')
  return parser.parse_args(argv)
