# SPDX-License-Identifier: Apache-2.0
"""What the entry points share: recipes from flags, errors as one sentence."""

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NoReturn

import jax
from etils import epath

from jaxsparse import config as config_lib
from jaxsparse.config import AdapterConfig, Config, DataConfig
from jaxsparse.config.errors import UserError, did_you_mean, require, shown
from jaxsparse.run import (
  field_meanings,
  help_pages,
  hosts,
  overrides,
  peers,
  recipe_files,
)
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.printing import escape_unprintable

_FLAGS = """
Flags besides the fields:
  --config=FILE:SIZE  a recipe, its path or its name, and which of its sizes;
      that of the workdir if it has one, else that of --config.train.start_from;
      --config.PART.FIELD=VALUE changes a
      field of it
  --workdir=FOLDER  of the run
  --distributed  join the other processes of the cluster's job
  --coordinator=HOST:PORT --num_processes=N --process_id=I  join those named so
  --wait_seconds=300  for each other
"""

# Characters of a complaint, which repeats what may be long.
_LONGEST = 200

# As long as a job may wait for its others.
_MOST_SECONDS = 7 * 24 * 3600
_HEARTBEAT_SECONDS = 300


@contextlib.contextmanager
def user_errors_end_in_a_sentence() -> Iterator[None]:
  """Prints a `UserError` to stderr and exits with 2, without a traceback.

  So ends, too, what JAX raises where the platform that was asked for is none.
  Who interrupts, or reads no further, has no need of a traceback either.
  """
  escape_unprintable()
  # Of tasks that failed when a read did, which is told in a sentence.
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  try:
    with peers.all_end_together():
      yield
  except UserError as error:
    _end(str(error))
  except KeyboardInterrupt:
    sys.exit(130)
  except BrokenPipeError:
    # Python would complain again while it exits.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  # An assertion is all that JAX has to say without a GPU.
  except (RuntimeError, AssertionError):
    if why := _missing_platform():
      _end(why)
    raise


def _end(sentence: str) -> NoReturn:
  print(f'error: {sentence}', file=sys.stderr)
  sys.exit(2)


def _missing_platform() -> str:
  """A sentence if JAX can't start on the platform asked for, or nothing."""
  asked = jax.config.jax_platforms
  if not asked:
    return ''
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:
    why = str(error).partition(' (set JAX_PLATFORMS')[0]
    why = ' '.join(why.split()).rstrip('.')
    return (
      f'JAX_PLATFORMS={asked} asks for devices that JAX does not find'
      f'{why and f" ({why})"}: '
      "install jaxsparse with its extra 'cuda' or 'tpu' on a machine that has "
      'them, or unset JAX_PLATFORMS.'
    )
  return ''


class Parser(argparse.ArgumentParser):
  """One whose complaints are sentences like all others."""

  def __init__(self, *args: Any, has_fields: bool = False, **kwargs: Any):
    super().__init__(*args, allow_abbrev=False, **kwargs)
    # Whether the program takes --config.a.b=value beside its flags.
    self._has_fields = has_fields

  def error(self, message: str) -> NoReturn:
    raise UserError(f'{message[:_LONGEST]}; see --help.')

  def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
    args = sys.argv[1:] if args is None else list(args)
    for arg in args:
      require(
        '\0' not in arg,
        f'a flag must not hold the NUL character, got {shown(arg)}.',
      )
    options, rest = self.parse_known_args(args, namespace)
    if rest:
      raise UserError(self._complaint(rest[0], options))
    return options

  def _complaint(self, arg: str, options: argparse.Namespace) -> str:
    if not arg.startswith('-'):
      return f'{shown(arg)} is not a flag: see --help.'
    name = arg.partition('=')[0]
    known = [*self._option_string_actions]
    for action in self._actions:
      if isinstance(action, argparse._SubParsersAction):
        chosen = action.choices[getattr(options, action.dest)]
        known += chosen._option_string_actions
    suggest = overrides.suggestion if self._has_fields else did_you_mean
    meant = suggest(name, known)
    return f'there is no flag {shown(name)[1:-1]}{meant}; see --help.'


class Once(argparse.Action):
  """Of a flag of which several would be lost but for the last."""

  def __call__(
    self,
    parser: argparse.ArgumentParser,
    namespace: argparse.Namespace,
    values: Any,
    option_string: str | None = None,
  ) -> None:
    before = getattr(namespace, self.dest)
    require(
      before == self.default,
      f'give {option_string} once, got {shown(before)} and {shown(values)}.',
    )
    setattr(namespace, self.dest, values)


def parse_recipe(
  description: str, argv: Sequence[str] | None = None
) -> tuple[Config, str]:
  """Reads `--config=FILE`, its overrides `--config.a.b=value` and `--workdir`.

  A workdir that has a config needs no recipe. `--help` prints `description` and
  where to start, `--help=PART` every field of a part, and exits.
  `--distributed` joins this process with the others of its cluster job, and
  `--coordinator`, `--num_processes` and `--process_id` with those named so,
  within `--wait_seconds`.

  Returns:
    The checked config and the workdir.

  Raises:
    UserError: a flag, the file, a field's name, type or value is wrong.
  """
  argv = sys.argv[1:] if argv is None else argv
  _help(description, argv)
  values = _parser().parse_args(overrides.split(argv)[1])
  notes: list[str] = []
  recipe = values.config or _own_config(values.workdir) or _start_config(argv)
  config = read_recipe(recipe, argv, notes.append)
  if not values.workdir:
    raise UserError("--workdir=FOLDER is missing: name the run's folder.")
  workdir_lib.require_reachable(values.workdir)
  _join_processes(values)
  if hosts.is_process_zero():
    for note in notes:
      _say(note)
  return config, workdir_lib.expanded(values.workdir)


def _own_config(workdir: str) -> Config | Literal['']:
  """That of a workdir which has one already."""
  if not workdir:
    return ''
  workdir = workdir_lib.expanded(workdir)
  workdir_lib.require_reachable(workdir)
  has_one = (epath.Path(workdir) / workdir_lib.CONFIG).exists()
  return workdir_lib.read_config(workdir) if has_one else ''


def _start_config(argv: Sequence[str]) -> Config | Literal['']:
  """That of the run whose parameters a new one begins with.

  What named its text is left out where the new run names its own, and so are
  settings of its adapter.
  """
  named = dict(overrides.split(argv)[0])
  if not named.get('train.start_from'):
    return ''
  # They read checkpoints, which takes more than a bare installation has.
  from jaxsparse.run import run_config, start

  config = run_config.read(start.parse(named['train.start_from'])[0], _say)
  if 'adapter.kind' in named:
    config = dataclasses.replace(config, adapter=AdapterConfig())
  if named.keys().isdisjoint(('data.text', 'data.tfds', 'data.messages')):
    return config
  plain = DataConfig()
  data = {
    name: getattr(plain, name)
    for name in (*map(_last_part, field_meanings.TEXT), 'replay_share')
  }
  return dataclasses.replace(
    config, data=dataclasses.replace(config.data, **data)
  )


def _last_part(name: str) -> str:
  return name.rpartition('.')[2]


def _help(description: str, argv: Sequence[str]) -> None:
  """Prints a page and exits, if that is asked for."""
  for i, arg in enumerate(argv):
    flag, _, part = arg.partition('=')
    if flag in ('-h', '--help', '--helpfull'):
      following = argv[i + 1] if i + 1 < len(argv) else ''
      if following in (*help_pages.PARTS, 'all'):
        part = part or following
      print(help_pages.page(description, _FLAGS, part))
      sys.exit(0)


def _parser() -> Parser:
  parser = Parser(add_help=False, has_fields=True)
  add = parser.add_argument
  add('--config', default='')
  add('--workdir', default='')
  add('--distributed', action='store_true')
  add('--coordinator')
  add('--num_processes', type=int)
  add('--process_id', type=int)
  add('--wait_seconds', type=float, default=300.0)
  return parser


def _join_processes(values: argparse.Namespace) -> None:
  """Makes this process one of several, if the flags say so."""
  named = [values.coordinator, values.num_processes, values.process_id]
  given = [value for value in named if value is not None]
  if not given:
    if values.distributed:
      _initialize(*_find_cluster(values.wait_seconds), values.wait_seconds)
    return
  if len(given) < len(named):
    raise UserError(
      '--coordinator=HOST:PORT, --num_processes and --process_id belong '
      f'together, got {", ".join(map(str, given))} only.'
    )
  address, num_processes, process_id = named
  if not 0 <= process_id < num_processes:
    raise UserError(
      f'--process_id must be 0 to {num_processes - 1} of --num_processes='
      f'{num_processes}, got {process_id}.'
    )
  host, _, port = address.rpartition(':')
  if not (host and port.isdecimal() and 0 < int(port) < 1 << 16):
    raise UserError(
      '--coordinator must be HOST:PORT of process 0, such as 10.0.0.1:1234, '
      f'got {address!r}.'
    )
  _initialize(*named, values.wait_seconds)


def _find_cluster(wait_seconds: float) -> tuple[str, int, int]:
  """The coordinator's address, the number of processes and this one's index."""
  # JAX does not give them before it starts, and then can't be stopped.
  from jax._src.clusters import ClusterEnv

  trouble = 'no sign of one'
  try:
    found = ClusterEnv.auto_detect_unset_distributed_params(
      os.environ.get('JAX_COORDINATOR_ADDRESS'),
      *[None] * 4,
      round(wait_seconds),
    )[:3]
    if None not in found:
      return found
  except Exception as error:  # Of a cluster's own kind: a variable, a server.
    trouble = f'{type(error).__name__}: {error}'.splitlines()[0]
  raise UserError(
    f'--distributed found no cluster ({trouble}): start it under SLURM, Open '
    'MPI, Kubernetes or on a TPU pod slice, give --coordinator, '
    '--num_processes and --process_id, or leave the flag out.'
  )


def _initialize(
  address: str, num_processes: int, process_id: int, wait_seconds: float
) -> None:
  if not 0 < wait_seconds <= _MOST_SECONDS:
    raise UserError(
      f'--wait_seconds must be above 0 and at most {_MOST_SECONDS}, got '
      f'{wait_seconds}.'
    )
  near = address
  if num_processes > 1:
    near = peers.meet(address, num_processes, process_id, wait_seconds)
  # It takes SIGTERM, which is the loop's.
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      near,
      num_processes,
      process_id,
      # The peers' own connections are sooner.
      heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    )
  except (ValueError, RuntimeError) as error:
    raise UserError(
      f'process {process_id} of {num_processes} did not join the others at '
      f'{address} ({str(error).splitlines()[0]}): start all of them again.'
    ) from error


def _say(note: str) -> None:
  print(note, file=sys.stderr, flush=True)


def read_recipe(
  recipe: str | Config,
  arguments: Sequence[str] = (),
  say: Callable[[str], None] = _say,
) -> Config:
  """The config that a recipe returns, with fields set by flags.

  Args:
    recipe: its path, or its name in configs/, and its size after a colon; or
      what one has made.
    arguments: among which are overrides `--config.a.b=value`.
    say: gets a sentence for each part that overrides add to the recipe.

  Raises:
    UserError: there is no such file, or it fails, or its config is nonsense.
  """
  if not recipe:
    raise UserError(
      '--config=FILE is missing: name a recipe, such as ultramem:tiny.'
    )
  config = recipe
  if isinstance(recipe, str):
    config = recipe_files.load(
      '--config', recipe, 'configs', 'get_config', Config
    )
  for note in overrides.apply(config, overrides.split(arguments)[0]):
    say(note)
  return config_lib.validated(config)
