# SPDX-License-Identifier: Apache-2.0
"""The config of a run: config.json, or its copy in the newest checkpoint."""

from collections.abc import Callable

from etils import epath

from jaxsparse.config import Config, saved_config
from jaxsparse.config.errors import UserError
from jaxsparse.run import checkpoint
from jaxsparse.run import workdir as workdir_lib


def read(
  workdir: epath.PathLike,
  say: Callable[[str], None] = print,
  may_see: bool = False,
) -> Config:
  """The config with which the workdir was trained; nothing is written.

  Args:
    workdir: of a training run.
    say: gets a sentence if config.json is of no use and a copy is taken.
    may_see: the caller knows what to do with a model of pictures.

  Raises:
    UserError: there is neither, it does not fit this version, or it is of
      pictures where a language model is wanted.
  """
  config = _read(workdir, say)
  if config.multimodal and not may_see:
    raise UserError(
      f'workdir {str(workdir)!r} holds a model of pictures and their texts, '
      'which jaxsparse retrieve, generate --image and serve read: give one of '
      'a language model.'
    )
  return config


def _read(workdir: epath.PathLike, say: Callable[[str], None]) -> Config:
  try:
    return workdir_lib.read_config(workdir)
  except saved_config.DamagedError as error:
    copy = saved_copy(workdir)
    if copy is None:
      raise
    say(f'{error.what}: taken from the newest checkpoint, which has a copy.')
    return copy


def saved_copy(workdir: epath.PathLike) -> Config | None:
  """The config in the newest checkpoint; older versions put none there.

  Raises:
    UserError: it does not fit this version.
  """
  record = checkpoint.read_record(workdir) or {}
  return (
    saved_config.from_json(record['config']) if 'config' in record else None
  )
