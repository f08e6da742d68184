# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the workdir: saved, kept, restored and loaded.

A checkpoint holds the logical arrays; the mesh is a choice made at restore
time. It also holds what `stored` compares when it reads one.

Orbax's own keeper of checkpoints is not used: it can't open a folder in which
the metadata of any step are damaged.
"""

import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from etils import epath
from orbax.checkpoint.experimental import v1 as ocp
from orbax.checkpoint.path import step as steps_lib

from jaxsparse.config.errors import UserError
from jaxsparse.run import (
  disk,
  fingerprints,
  hosts,
  mapped_tables,
  stored,
)
from jaxsparse.run.row_file import RowFile
from jaxsparse.run.stored import OPTIMIZER, PARAMS

# Of parameters that are written at one time, where nobody waits to go on.
_WRITTEN_BYTES = 2**25


class Checkpoints:
  """The checkpoints of one workdir, saved asynchronously.

  The newest are kept, and those of the lowest validation loss.
  """

  def __init__(self, workdir: epath.PathLike, keep: int, keep_best: int = 0):
    """Opens the folder, and removes what a killed save left there.

    Args:
      workdir: an existing folder.
      keep: newest checkpoints that are kept.
      keep_best: checkpoints kept for their validation loss, see `note_loss`.

    Raises:
      UserError: checkpoints can't be written there.
    """
    self._directory = stored.folder_of(workdir)
    self._keep, self._keep_best = keep, keep_best
    self._losses: dict[int, float] = {}
    self._worker = ThreadPoolExecutor(1, 'checkpoints')
    self._saving: tuple[int, list[int], Future] | None = None
    with hosts.process_zero_first():
      if hosts.is_process_zero():
        self._guarded(self._prepare)
    # All processes follow what process 0 sees.
    self._steps = hosts.gather(stored.steps_in(workdir))[0]
    # What no training can make again stays.
    self._given = {s for s in self._steps if self._has_no_optimizer(s)}

  def _prepare(self) -> None:
    self._directory.mkdir(parents=True, exist_ok=True)
    probe = self._directory / '.writable'
    probe.touch()
    probe.unlink()
    for left in steps_lib.all_temporary_paths(self._directory):
      left.get().rmtree()

  def _has_no_optimizer(self, step: int) -> bool:
    path = self._directory / str(step)
    return (path / PARAMS).exists() and not (path / OPTIMIZER).exists()

  def steps(self) -> list[int]:
    """Steps of the checkpoints saved and kept, oldest first."""
    return list(self._steps)

  def save(self, step: int, params: Any, optimizer: Any, record: Any) -> None:
    """Starts saving; returns as soon as the arrays may be overwritten.

    Args:
      step: optimizer steps done.
      params: the parameters.
      optimizer: a pytree of arrays, restored together with the parameters.
      record: anything JSON can hold, such as the data iterator's state.

    Raises:
      UserError: the disk is full or not writable, now or in the save before.
    """
    if step in self._steps:
      return
    self._finish(is_superseded=True)
    arrays = {PARAMS: params, OPTIMIZER: optimizer}
    metadata = _sealed(arrays, record)
    response = self._guarded(
      lambda: ocp.save_checkpointables_async(
        self._directory / str(step), arrays, custom_metadata=metadata
      )
    )
    self._steps.append(step)
    # Decided here and not when the save is done: all processes must agree.
    doomed = self._forget()
    saving = self._worker.submit(self._complete, response, doomed)
    self._saving = step, doomed, saving

  def _complete(self, response: Any, doomed: list[int]) -> None:
    response.result()
    self._remove(doomed)

  def note_loss(self, step: int, loss: float) -> None:
    """Takes in the validation loss of a step, saved or about to be."""
    if math.isfinite(loss):
      self._losses[step] = loss

  def is_among_best(self, step: int) -> bool:
    """Whether the step is to be kept for its loss, once it is saved."""
    return step in self._best()

  def _best(self) -> list[int]:
    ranked = sorted(self._losses, key=self._losses.__getitem__)
    return ranked[: self._keep_best]

  def _forget(self) -> list[int]:
    """Takes the steps that are no longer kept from the list."""
    kept = {*self._steps[-self._keep :], *self._best(), *self._given}
    doomed = [step for step in self._steps if step not in kept]
    self._steps = [step for step in self._steps if step in kept]
    self._losses = {s: x for s, x in self._losses.items() if s in kept}
    return doomed

  def _remove(self, steps: list[int]) -> None:
    if hosts.is_process_zero():
      for step in steps:
        _remove(self._directory / str(step))

  def wait(self) -> None:
    """Waits for the save in progress; raises what `save` raises."""
    self._finish(is_superseded=False)

  def _finish(self, is_superseded: bool) -> None:
    if self._saving is None:
      return
    (step, doomed, saving), self._saving = self._saving, None
    try:
      self._guarded(saving.result)
    except Exception as error:
      # Those that were to give way to it are still there.
      self._steps = sorted({*self._steps, *doomed} - {step})
      if not self._is_deleted(step):
        raise
      # Nothing is lost if the next one is about to be saved.
      if not is_superseded:
        raise UserError(
          f'the checkpoint of step {step} was deleted from '
          f'{str(self._directory)!r} while it was being written: start the '
          'same command again.'
        ) from error

  def _is_deleted(self, step: int) -> bool:
    """Whether neither the checkpoint nor the beginning of it is there."""
    return not any(
      path.name.split('.')[0] == str(step)
      for path in (
        self._directory.iterdir() if self._directory.is_dir() else ()
      )
    )

  def close(self) -> None:
    """Waits, and removes what is not kept; raises what `save` raises."""
    try:
      self.wait()
      self._remove(self._forget())
    finally:
      self._worker.shutdown()

  def _guarded(self, action: Callable[[], Any]) -> Any:
    return disk.guarded(self._directory, action)

  def restore(
    self,
    params: Any,
    optimizer: Any,
    say: Callable[[str], None],
    other_optimizers: Sequence[Any] = (),
  ) -> tuple[int, Any, Any | None, Any] | None:
    """The newest checkpoint that is whole.

    A damaged one is moved to `damaged/` in the workdir and the one before it
    is tried.

    Args:
      params: abstract parameters with the shardings to restore to.
      optimizer: likewise, of what was saved as `optimizer`.
      say: gets a sentence about each checkpoint that could not be read.
      other_optimizers: `optimizer` as earlier versions or other types of
        activations have it; a checkpoint of theirs is restored to it.

    Returns:
      step, params, optimizer, record; None if there is no checkpoint. The
      optimizer is None if `save_params` wrote it.

    Raises:
      UserError: there are checkpoints, but none that can be read; or they have
        other arrays, or belong to another tokenizer or model.
    """
    steps = self.steps()
    abstract = {PARAMS: params, OPTIMIZER: optimizer}
    others = [{PARAMS: params, OPTIMIZER: other} for other in other_optimizers]
    for step in reversed(steps):
      try:
        arrays, record = stored.read(self._directory, step, abstract, others)
      except stored.DamageError as damage:
        say(
          f'The checkpoint of step {step} is damaged ({damage}); it was moved '
          f'to {str(self._set_aside(step))!r}.'
        )
        continue
      return step, arrays[PARAMS], arrays.get(OPTIMIZER), record
    if steps:
      raise UserError(
        f'none of the checkpoints of steps {steps} could be read: see the '
        'sentences above, or give another --workdir to start anew.'
      )
    return None

  def _set_aside(self, step: int) -> epath.Path:
    source = self._directory / str(step)
    target = self._directory.parent / 'damaged' / str(step)
    while target.exists():
      target = target.with_name(target.name + '_')

    def move():
      target.parent.mkdir(exist_ok=True)
      source.rename(target)

    with hosts.process_zero_first():
      if hosts.is_process_zero():
        self._guarded(move)
    self._steps.remove(step)
    return target


def save_params(workdir: epath.PathLike, params: Any, record: Any) -> None:
  """Writes a checkpoint of step 0 without a state of an optimizer.

  Args:
    workdir: an existing folder without checkpoints.
    params: the parameters.
    record: anything JSON can hold.

  Raises:
    UserError: the disk is full or not writable.
  """
  directory, arrays = stored.folder_of(workdir), {PARAMS: params}
  metadata = _sealed(arrays, record)

  largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
  context = ocp.Context()
  # Else all arrays are compressed at once, which takes as much room again.
  context.memory.write_concurrent_bytes = max(_WRITTEN_BYTES, largest + 1)

  def save():
    directory.mkdir(parents=True, exist_ok=True)
    with context:
      ocp.save_checkpointables(
        directory / '0', arrays, custom_metadata=metadata
      )

  disk.guarded(directory, save)


def load_params(
  workdir: epath.PathLike,
  step: int | None = None,
  say: Callable[[str], None] | None = None,
  abstract: Any = None,
  tables: str = '',
  show: mapped_tables.Show = RowFile.array,
  form: mapped_tables.Form | None = None,
) -> tuple[int, Any]:
  """The parameters of a checkpoint, compared with what was saved.

  Nothing in the workdir changes. Tables on file are mapped, which takes no time
  and no memory; `row_store` says how far they are compared.

  Args:
    workdir: of a training run.
    step: which checkpoint; None takes the newest that is whole.
    say: gets a sentence about each checkpoint that could not be read; None
      writes it to stderr.
    abstract: the parameters' shapes, types and shardings; None places them
      whole on every device of the mesh in use, or on the default device.
    tables: where those of memory layers are to lie: 'device', 'host', or
      'file', for which those of a checkpoint that has them as arrays are
      written to mapped files the first time; empty leaves them where they are.
    show: makes of a mapped file what stands for its table.
    form: of rows that mapped tables are to have; None takes them as they are.

  Returns:
    The step and the parameters.

  Raises:
    UserError: there is no such checkpoint, it can't be read, or it belongs to
      another tokenizer or model.
  """
  say = say or _to_stderr
  steps = stored.steps_in(workdir)
  if not steps and step is None:
    raise UserError(
      f'workdir {str(workdir)!r} holds no checkpoints yet: train first.'
    )
  if step not in (None, *steps):
    raise UserError(
      f'workdir {str(workdir)!r} has no checkpoint of step {step}: it has '
      f'{steps or "none"}.'
    )
  for candidate in reversed(steps) if step is None else [step]:
    try:
      params = mapped_tables.read_params(
        workdir, candidate, abstract, tables, say, show, form
      )
    except stored.DamageError as damage:
      if step is not None:
        raise UserError(
          f"the checkpoint of step {step} in {str(workdir)!r} can't be read "
          f'({damage}): choose another step of {steps}.'
        ) from damage
      say(f'The checkpoint of step {candidate} is damaged ({damage}).')
      continue
    return candidate, params
  raise UserError(
    f'none of the checkpoints of steps {steps} in {str(workdir)!r} can be '
    'read: see the sentences above.'
  )


def read_record(workdir: epath.PathLike) -> dict | None:
  """What the loop wrote beside the arrays of the newest checkpoint.

  Nothing in the workdir changes, and no array is read. A damaged record is
  passed over for the one before it; None if there is none.
  """
  directory = stored.folder_of(workdir)
  for step in reversed(stored.steps_in(workdir)):
    try:
      found = ocp.metadata(directory / str(step), PARAMS)
      return fingerprints.unseal(found.custom_metadata)['record']
    except Exception:  # Orbax has no type for 'damaged'.
      continue
  return None


def best_step(workdir: epath.PathLike, losses: dict[int, float]) -> int:
  """The step of the checkpoint with the lowest validation loss.

  Args:
    workdir: of a training run.
    losses: validation losses by step.

  Raises:
    UserError: no checkpoint has one.
  """
  known = [step for step in stored.steps_in(workdir) if step in losses]
  if not known:
    raise UserError(
      f'no checkpoint in workdir {str(workdir)!r} has a validation loss: '
      'choose a step, or train with train.eval_every and train.keep_best.'
    )
  return min(known, key=losses.__getitem__)


def _sealed(arrays: dict[str, Any], record: Any) -> dict:
  """What stands beside the arrays of a checkpoint."""
  sums = {name: fingerprints.of_arrays(tree) for name, tree in arrays.items()}
  return fingerprints.seal({'fingerprints': sums, 'record': record})


def _remove(path: epath.Path) -> None:
  try:
    path.rmtree()
  except OSError:
    if path.exists():
      raise


def _to_stderr(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
