# SPDX-License-Identifier: Apache-2.0
"""A workdir that no training made: of a checkpoint of others, or of a change.

It has parameters and no optimizer's state. All that reads a run's workdir reads
it, and training begins from it, at step 0.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from etils import epath

from jaxsparse.config import AdapterConfig, Config, saved_config
from jaxsparse.config.errors import UserError
from jaxsparse.run import checkpoint, hosts, provenance, workdir_lock
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.stored import QUANTIZED


def require_new(workdir: epath.PathLike, flag: str = '--workdir') -> None:
  """Checks that nothing is there yet that could be lost.

  What a start that was killed has left there is removed.

  Args:
    workdir: the folder; it is made if it is missing.
    flag: by which it was named.

  Raises:
    UserError: the workdir holds something, or can't be reached or made.
  """
  workdir_lib.require_reachable(workdir)
  path = epath.Path(workdir)
  with workdir_lib.write_errors(workdir, flag):
    is_whole = (path / workdir_lib.CONFIG).exists()
    if (path / _UNFINISHED).exists() and not is_whole:
      with workdir_lock.held(workdir):
        _empty(path)
    if workdir_lib.holds_something(path):
      raise UserError(
        f'{flag}={workdir} must be new or an empty folder, but holds '
        'something: name another, or move it away.'
      )
    path.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def emptied_on_failure(workdir: epath.PathLike) -> Iterator[None]:
  """Leaves a workdir that was new or empty as it was, so that one can retry.

  A kill leaves what has been written, and a file by which `require_new` tells.

  Raises:
    UserError: another start writes there, or it can't be written.
  """
  path = epath.Path(workdir)
  with workdir_lock.held(workdir):
    try:
      with workdir_lib.write_errors(workdir):
        (path / _UNFINISHED).write_text('')
      yield
      (path / _UNFINISHED).unlink()
    except BaseException:
      _empty(path)
      raise


def _empty(folder: epath.Path) -> None:
  for path in folder.iterdir():
    path.rmtree() if path.is_dir() else path.unlink()


# Stands in a workdir until all has been written.
_UNFINISHED = 'unfinished'


def write(
  workdir: epath.PathLike,
  config: Config,
  params: Any,
  origin: dict[str, Any],
  quantized: dict[str, Any] | None = None,
) -> None:
  """Writes a checkpoint of step 0, and config.json when it is whole.

  Args:
    workdir: a folder with the tokenizer's files, if the model has any.
    config: with the vocabulary's size set.
    params: float32 arrays on any mesh, as `config.model` has them.
    origin: where they are from, of what JSON can hold; the checkpoint's record
      keeps it.
    quantized: what the leaves are that are no floats, if there are any.

  Raises:
    UserError: the workdir can't be written.
  """
  # It is where the parameters are from, so a run of it begins here; of an
  # adapter they have what it has learned.
  train = dataclasses.replace(config.train, start_from='')
  config = dataclasses.replace(config, train=train, adapter=AdapterConfig())
  # What has no tokenizer may get one later.
  recorded = provenance.record(config, workdir)
  record = {name: of for name, of in recorded.items() if of}
  if quantized:
    record[QUANTIZED] = quantized
  checkpoint.save_params(workdir, params, record | {ORIGIN: origin})
  # Last: of a config alone, as a kill would leave it, training would begin
  # from nothing.
  if hosts.is_process_zero():
    with workdir_lib.write_errors(workdir):
      workdir_lib.write_whole(
        epath.Path(workdir) / workdir_lib.CONFIG,
        saved_config.to_json(config).encode(),
      )


# What the record of such a checkpoint has instead of a place in the data.
ORIGIN = 'origin'
