"""What the entry points share: recipes from flags, errors as one sentence."""

import contextlib
import dataclasses
import inspect
import pathlib
import runpy
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import flags

from jaxsparse import config as config_lib
from jaxsparse import workdir as workdir_lib
from jaxsparse.config import Config
from jaxsparse.errors import UserError


@contextlib.contextmanager
def user_errors_end_in_a_sentence() -> Iterator[None]:
  """Prints a `UserError` to stderr and exits with 2, without a traceback."""
  try:
    yield
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)


def parse_recipe(description: str) -> tuple[Config, str]:
  """Reads `--config=FILE`, its overrides `--config.a.b=value` and `--workdir`.

  `--help` prints `description` and every field of the config, and exits.
  `--distributed` joins this process with the others of its cluster job, and
  `--coordinator`, `--num_processes` and `--process_id` with those named so.

  Returns:
    The checked config and the workdir.

  Raises:
    UserError: a flag, the file, a field's name, type or value is wrong.
  """
  argv = sys.argv
  if {'--help', '-h', '--helpfull'} & set(argv):
    print(description, *describe(Config()), sep='\n')
    sys.exit(0)
  values = flags.FlagValues()
  flags.DEFINE_string('workdir', None, '', flag_values=values)
  flags.DEFINE_bool('distributed', False, '', flag_values=values)
  flags.DEFINE_string('coordinator', None, '', flag_values=values)
  for name in ('num_processes', 'process_id'):
    flags.DEFINE_integer(name, None, '', flag_values=values)
  config = _parse_flags(values, argv)
  if not values.workdir:
    raise UserError("--workdir=FOLDER is missing: name the run's folder.")
  _join_processes(values)
  return config, workdir_lib.expanded(values.workdir)


def _parse_flags(values: flags.FlagValues, argv: list[str]) -> Config:
  """Sets the flags; returns the recipe with its overrides, checked."""
  # Only a recipe needs it; a bench may run where it is not installed.
  from ml_collections import config_flags

  read_recipe(_config_path(argv))
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
  try:
    rest = values(argv)[1:]
    config = values.config
  except (flags.Error, KeyError, AttributeError, TypeError) as error:
    message = str(error.args[0] if error.args else error).splitlines()[0]
    raise UserError(
      f'{message.rstrip(".")}: see --help for the fields and their types.'
    ) from error
  if rest:
    raise UserError(
      f'{rest[0]!r} is not a flag: write --config.section.field=value.'
    )
  return config_lib.validated(config)


def _join_processes(values: flags.FlagValues) -> None:
  """Makes this process one of several, if the flags say so."""
  named = [values.coordinator, values.num_processes, values.process_id]
  given = [value for value in named if value is not None]
  if not given:
    if values.distributed:
      _initialize(
        'found no cluster',
        'start it under SLURM, Open MPI, Kubernetes or on a TPU pod slice, '
        'give --coordinator, --num_processes and --process_id, or leave the '
        'flag out',
      )
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
  if not address.rpartition(':')[2].isdigit():
    raise UserError(
      '--coordinator must be HOST:PORT of process 0, such as 10.0.0.1:1234, '
      f'got {address!r}.'
    )
  _initialize(
    f'did not meet {num_processes} processes at {address}',
    'start all of them, with the same --coordinator',
    *named,
  )


def _initialize(trouble: str, advice: str, *args: Any) -> None:
  try:
    jax.distributed.initialize(*args)
  except (ValueError, RuntimeError) as error:
    raise UserError(
      f'--distributed {trouble} ({str(error).splitlines()[0]}): {advice}.'
    ) from error


def _config_path(argv: list[str]) -> str:
  """The value of `--config`."""
  path = ''
  for flag, following in zip(argv, [*argv[1:], ''], strict=True):
    name, _, value = flag.partition('=')
    if name.lstrip('-') == 'config':
      path = value or following
  if not path:
    raise UserError(
      '--config=FILE is missing: name a recipe, such as '
      'configs/ultramem_tiny.py.'
    )
  return path


def read_recipe(path: str, overrides: Sequence[str] = ()) -> Config:
  """The config that the recipe at `path` returns.

  Args:
    path: of the recipe.
    overrides: flags `--config.a.b=value`.

  Raises:
    UserError: there is no such file, or it fails, or its config is nonsense.
  """
  path = workdir_lib.expanded(path)
  if overrides:
    argv = ['', f'--config={path}', *overrides]
    return _parse_flags(flags.FlagValues(), argv)
  if not pathlib.Path(path).is_file():
    raise UserError(
      f'--config={path} is no file: name a recipe, such as '
      'configs/ultramem_tiny.py.'
    )
  try:
    config = runpy.run_path(path)['get_config']()
  except UserError as error:
    raise UserError(f'{path}: {error}') from error
  except Exception as error:
    raise UserError(
      f'--config={path} could not be read ({type(error).__name__}: {error}): '
      'give a Python file whose get_config() returns a jaxsparse Config.'
    ) from error
  if not isinstance(config, Config):
    raise UserError(
      f'get_config() in {path} must return a jaxsparse.config.Config, got '
      f'{type(config).__name__}.'
    )
  return config_lib.validated(config)


def describe(config: Any, prefix: str = '--config') -> list[str]:
  """A line for every field: flag, default, and the comment in the source."""
  lines, comment = [], []
  fields = {field.name: field for field in dataclasses.fields(config)}
  for line in inspect.getsource(type(config)).splitlines():
    text = line.strip()
    if text.startswith('#'):
      comment.append(text.lstrip('# '))
      continue
    name = text.split(':')[0]
    if line.startswith('  ') and name in fields and ':' in text:
      value = getattr(config, name)
      if dataclasses.is_dataclass(value):
        lines += describe(value, f'{prefix}.{name}')
      else:
        lines.append(f'  {prefix}.{name}={value}  {" ".join(comment)}'.rstrip())
        if value is None and name in _OPTIONAL:
          lines += describe(_OPTIONAL[name](), f'{prefix}.{name}')
    comment = []
  return lines


# What a recipe may have or not: described by its defaults.
_OPTIONAL = dict(
  memory=config_lib.MemoryConfig,
  moe=config_lib.MoEConfig,
  dcmha=config_lib.DCMHAConfig,
  sparse=config_lib.SparseAttentionConfig,
)
