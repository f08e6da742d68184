# SPDX-License-Identifier: Apache-2.0
"""The command `jaxsparse`, also as `python -m jaxsparse`."""

import importlib
import sys
import types
from collections.abc import Sequence

import jaxsparse
from jaxsparse.config.errors import UserError, did_you_mean, shown
from jaxsparse.run.command_line import user_errors_end_in_a_sentence

# Each with its module and what it does.
COMMANDS = {
  'train': ('cli.train', 'train a model of a recipe, or go on with it'),
  'generate': ('cli.generate', 'let a trained model write'),
  'serve': ('serving.command', "serve a trained model to OpenAI's clients"),
  'retrieve': (
    'cli.retrieve',
    'find pictures by a text, or texts by a picture',
  ),
  'evaluate': ('cli.evaluate', 'measure a trained model on tasks and texts'),
  'convert': (
    'cli.convert',
    'bring in a published checkpoint, or bring a model out',
  ),
  'quantize': ('cli.quantize', 'store a trained model in 8 or 4 bits'),
  'report': ('cli.report', 'draw what a run left'),
  'adapters': (
    'cli.adapters',
    'say what adapters are, merge, add and remove deltas of rows',
  ),
  'tables': ('cli.tables', 'say what tables on file are, and compare them'),
  'cost': ('cli.cost', 'say parameters, FLOPs and bytes of a recipe'),
  'compare': (
    'experiments.compare.command',
    'train architectures at equal budget and compare them',
  ),
  'bench': ('experiments.bench.command', 'measure how fast and how large'),
}


# Of commands that need another extra than `train`.
_EXTRAS = {'serve': 'serve'}


def model_server() -> None:
  """The console script `model-server`: `jaxsparse serve` by another name."""
  main(['serve', *sys.argv[1:]])


def main(argv: Sequence[str] | None = None) -> None:
  """Runs the command that `argv` (by default the process's) begins with."""
  argv = sys.argv[1:] if argv is None else list(argv)
  with user_errors_end_in_a_sentence():
    if not argv or argv[0] in ('-h', '--help'):
      print(_page())
      return
    if argv[0] == '--version':
      print(f'jaxsparse {jaxsparse.__version__}')
      return
    name, *rest = argv
    if name not in COMMANDS:
      raise UserError(
        f'there is no command {shown(name)}{did_you_mean(name, COMMANDS)}; '
        f'there are {", ".join(COMMANDS)}.'
      )
    imported(name, COMMANDS[name][0]).main(rest)


def imported(name: str, module: str) -> types.ModuleType:
  """A command's module: only what it needs, as `cost` needs no data's readers.

  Raises:
    UserError: a package is not installed.
  """
  try:
    return importlib.import_module(f'jaxsparse.{module}')
  except ModuleNotFoundError as error:
    missing = (error.name or '').partition('.')[0]
    if missing == 'jaxsparse':
      raise
    raise UserError(
      f'jaxsparse {name} needs {missing}, which is not installed: pip install '
      f"'jaxsparse[{_EXTRAS.get(name, 'train')}]'."
    ) from error


def _page() -> str:
  lines = ['usage: jaxsparse COMMAND ...', '']
  lines += [f'  {name:<10}{what}' for name, (_, what) in COMMANDS.items()]
  return '\n'.join([*lines, '', '`jaxsparse COMMAND --help` says more.'])
