# SPDX-License-Identifier: Apache-2.0
"""Measures a trained model on tasks and texts: jaxsparse evaluate.

The table goes to stdout; results and the score of every item go to
`evaluations/` in the workdir. An evaluation that is stopped goes on where it
was.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

import jaxsparse
from jaxsparse.analysis import evaluation_pictures
from jaxsparse.config import tables
from jaxsparse.config.errors import UserError, require
from jaxsparse.evaluation import find_tasks, models, store, table
from jaxsparse.evaluation.run import Result, evaluate
from jaxsparse.evaluation.scorer import BATCH_TOKENS
from jaxsparse.evaluation.tasks import QuestionTask, Task, TextTask
from jaxsparse.inference.adapters import add_flags
from jaxsparse.inference.quantize import QUANTIZE_HELP, parse
from jaxsparse.run import trained
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.command_line import Parser
from jaxsparse.run.progress import Reporter

PICTURE = 'evaluations.png'


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
  parser = Parser(
    prog='jaxsparse evaluate',
    description='Measure a trained model: log-likelihoods of answers, bits per '
    'byte of texts.',
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
    '--tasks',
    default='',
    help='names with commas between, such as arc_easy,lambada, of files in '
    '--data',
  )
  add('--data', default='.', help='folder with NAME.jsonl or NAME.jsonl.gz')
  add(
    '--requests',
    action='append',
    default=[],
    metavar='FILE',
    help='a file of questions, of several each; docs/guides/evaluate.md has '
    'the forms',
  )
  add(
    '--text',
    action='append',
    default=[],
    metavar='GLOB',
    help='text files whose bits per byte are measured, of several sets each',
  )
  add(
    '--window',
    type=int,
    help='tokens of a text that are read at once; %(default)s: as many as '
    '--max-len says, at most 2048',
  )
  add(
    '--stride',
    type=int,
    help='tokens of a text that a window scores; %(default)s: all of it',
  )
  add(
    '--step',
    type=trained.to_step,
    help='checkpoint to read, or "best": the one of the lowest validation '
    'loss; %(default)s: the newest',
  )
  add('--limit', type=int, help='first questions of a file, or first texts')
  add(
    '--max-len',
    type=int,
    help='tokens that the model reads at most; %(default)s: as in training',
  )
  add(
    '--batch-tokens',
    type=int,
    default=BATCH_TOKENS,
    help='tokens of a batch, padding among them; scores do not depend on it',
  )
  add('--devices', type=int, default=1, help='over which batches are split')
  add('--quantize', default='', metavar='HOW', help=QUANTIZE_HELP)
  add_flags(parser)
  add(
    '--tables',
    choices=tables.STORES,
    default='',
    help='where the tables of memory layers lie: on the device, in host '
    'memory, or in mapped files, which take no memory; %(default)s: as the run '
    'has them',
  )
  add(
    '--against',
    metavar='WORKDIR',
    help='another run, with differences question by question',
  )
  add(
    '--against-step',
    type=trained.to_step,
    help='its checkpoint, as --step says',
  )
  add(
    '--output',
    metavar='FOLDER',
    help='where results go, instead of evaluations/ in the workdir',
  )
  add(
    '--harness',
    default='',
    metavar='TASKS',
    help="tasks of lm-evaluation-harness, with commas between; extra 'eval'",
  )
  add('--include-path', help='folder with tasks of your own for --harness')
  arguments = parser.parse_args(argv)
  _check(arguments)
  return arguments


def _check(arguments: argparse.Namespace) -> None:
  for name in ('limit', 'max_len', 'batch_tokens', 'window', 'stride'):
    value = getattr(arguments, name)
    require(
      value is None or value >= 1,
      f'--{name.replace("_", "-")} must be at least 1, got {value}.',
    )
  own = [*arguments.requests, *arguments.text, arguments.tasks]
  require(
    any(own) or bool(arguments.harness),
    'nothing is to be measured: give --tasks, --requests, --text or --harness.',
  )
  require(
    not (arguments.harness and (any(own) or arguments.against)),
    '--harness has results of its own: give it without --tasks, --requests, '
    '--text and --against.',
  )
  for name in ('workdir', 'against', 'output', 'data', 'include_path'):
    if value := getattr(arguments, name):
      setattr(arguments, name, workdir_lib.expanded(value))


def tasks_of(arguments: argparse.Namespace) -> list[Task]:
  """What the flags name.

  Raises:
    UserError: a task or a file is missing or wrong, or two have one name.
  """
  files = {}
  if names := [n.strip() for n in arguments.tasks.split(',') if n.strip()]:
    files = find_tasks.files(pathlib.Path(arguments.data), names)
  for given in arguments.requests:
    path = pathlib.Path(workdir_lib.expanded(given))
    name = find_tasks.name_of(path) or path.name
    if name in files:
      raise UserError(f'two files are called {name!r}: rename one of them.')
    files[name] = path
  limit = arguments.limit
  tasks: list[Task] = [
    *(QuestionTask.read(name, path, limit) for name, path in files.items()),
    *(
      TextTask.read(pattern, arguments.window, arguments.stride, limit)
      for pattern in dict.fromkeys(arguments.text)
    ),
  ]
  kept: dict[str, str] = {}
  for task in tasks:
    other = kept.setdefault(store.stem_of(task.name), task.name)
    require(
      other == task.name,
      f'results of {other!r} and of {task.name!r} would go to one file: '
      'evaluate them one by one, the second with --output=FOLDER.',
    )
  return tasks


def main(argv: Sequence[str]) -> None:
  arguments = parse_arguments(argv)
  if arguments.harness:
    _evaluate_by_harness(arguments)
    return
  tasks = tasks_of(arguments)
  folder = store.folder_of(arguments.workdir, arguments.output)
  step, results = _evaluate_all(
    arguments, arguments.workdir, arguments.step, tasks, folder
  )
  drawn = {_name(arguments.workdir): evaluation_pictures.read(folder)}
  if not arguments.against:
    print(table.of_results(results))
  else:
    output = arguments.output and f'{arguments.output}/against'
    other = store.folder_of(arguments.against, output)
    other_step, others = _evaluate_all(
      arguments, arguments.against, arguments.against_step, tasks, other
    )
    print(table.of_differences(results, others))
    _keep_differences(arguments, folder, step, other_step, results, others)
    drawn = {
      f'{_name(workdir)}, step {of}': [
        result
        for result in evaluation_pictures.read(place)
        if result['settings']['step'] == of
      ]
      for workdir, place, of in (
        (arguments.workdir, folder, step),
        (arguments.against, other, other_step),
      )
    }
  path = folder.parent / workdir_lib.PLOTS / PICTURE
  if arguments.output:
    path = folder / PICTURE
  else:
    workdir_lib.make_folder(path.parent)
  with workdir_lib.write_errors(path.parent):
    evaluation_pictures.draw(drawn, path)
  _say(f'Results are in {str(folder)!r}, and a picture is {str(path)!r}.')


def _evaluate_all(
  arguments: argparse.Namespace,
  workdir: str,
  step: int | str | None,
  tasks: list[Task],
  folder: pathlib.Path,
) -> tuple[int, list[Result]]:
  """Results of one model on all tasks, and its step."""
  options = _options(arguments, step)
  if workdir != arguments.workdir:
    # The other run is compared as it is.
    options = dataclasses.replace(options, adapters=())
  with models.load(workdir, options, _say) as loaded:
    reporter = Reporter()
    return loaded.step, [
      evaluate(
        task,
        loaded.scorer,
        store.Store(
          folder,
          loaded.step,
          task.name,
          dict(task=task.name, jaxsparse=jaxsparse.__version__)
          | loaded.settings
          | task.settings,
        ),
        reporter,
      )
      for task in tasks
    ]


def _options(
  arguments: argparse.Namespace, step: int | str | None
) -> models.Options:
  return models.Options(
    step=step,
    max_length=arguments.max_len,
    batch_tokens=arguments.batch_tokens,
    devices=arguments.devices,
    quantization=parse(arguments.quantize),
    tables=arguments.tables,
    adapters=tuple(arguments.adapter),
    is_forced=arguments.force,
  )


def _keep_differences(
  arguments: argparse.Namespace,
  folder: pathlib.Path,
  step: int,
  other_step: int,
  results: list[Result],
  others: list[Result],
) -> None:
  """Writes the differences beside the results."""
  found = {}
  for result, other in zip(results, others, strict=True):
    pairs = {
      name: metric.minus(other.metrics[name])
      for name, metric in result.metrics.items()
    }
    found[result.task] = {
      name: dict(difference=pair.value, stderr=pair.error)
      for name, pair in pairs.items()
      if pair is not None
    }
  content = dict(
    workdir=arguments.workdir, step=step, against=arguments.against,
    against_step=other_step, limit=arguments.limit, differences=found,
  )  # fmt: skip
  name = f'{step}.against.{_name(arguments.against)}.{other_step}.json'
  with workdir_lib.write_errors(folder):
    workdir_lib.write_whole(
      folder / name, json.dumps(content, indent=2).encode() + b'\n'
    )


def _name(workdir: str) -> str:
  return pathlib.Path(workdir).resolve().name


def _evaluate_by_harness(arguments: argparse.Namespace) -> None:
  # Imported where it is asked for: it brings much, and is an extra.
  from jaxsparse.evaluation import harness

  names = [n.strip() for n in arguments.harness.split(',') if n.strip()]
  folder = store.folder_of(arguments.workdir, arguments.output)
  options = _options(arguments, arguments.step)
  with models.load(arguments.workdir, options, _say) as loaded:
    results = harness.evaluate(
      loaded.scorer, names, arguments.include_path, arguments.limit
    )
  path = folder / f'{loaded.step}.harness.json'
  content = dict(results=results['results'], settings=loaded.settings)
  with workdir_lib.write_errors(folder):
    workdir_lib.write_whole(
      path, json.dumps(content, indent=2, default=str).encode() + b'\n'
    )
  print(harness.table(results))
  _say(f'Results are in {str(path)!r}.')


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
