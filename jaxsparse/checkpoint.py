"""Checkpoints in the workdir: the only importer of Orbax.

A checkpoint holds the logical arrays; the mesh is a choice made at restore
time. It also holds a fingerprint of every array and a digest of all else that
a resume reads, because Orbax notices missing and truncated files but not a
flipped bit inside a value.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint.experimental import v1 as ocp
from orbax.checkpoint.path import step as step_names

from jaxsparse import hosts
from jaxsparse import workdir as workdir_lib
from jaxsparse.errors import UserError, require_utf8

# What each checkpoint is made of; `params` stands alone so that inference
# reads nothing else.
PARAMS, OPTIMIZER = 'params', 'optimizer'


class Checkpoints:
  """The checkpoints of one workdir: saved asynchronously, the last n kept."""

  def __init__(self, workdir: epath.PathLike, keep: int):
    self._directory = _checkpoints_folder(workdir)
    self._keep = keep
    self._open()

  def _open(self) -> None:
    self._checkpointer = ocp.training.Checkpointer(
      self._directory,
      preservation_policy=ocp.training.preservation_policies.LatestN(
        self._keep
      ),
      cleanup_tmp_directories=True,
    )

  def steps(self) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    return sorted(c.step for c in self._checkpointer.checkpoints)

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
    if step in self.steps():
      return
    arrays = {PARAMS: params, OPTIMIZER: optimizer}
    fingerprints = np.asarray(_fingerprints(arrays)).tolist()
    metadata = _sealed({'fingerprints': fingerprints, 'record': record})
    self._guarded(
      lambda: self._checkpointer.save_checkpointables_async(
        step, arrays, force=True, custom_metadata=metadata
      )
    )

  def wait(self) -> None:
    """Waits for the save in progress; raises what `save` raises."""
    self._guarded(self._checkpointer.wait)

  def close(self) -> None:
    self._guarded(self._checkpointer.close)

  def _guarded(self, action: Callable[[], Any]) -> None:
    try:
      action()
    except Exception as error:
      if not _is_disk_trouble(error):
        raise
      raise UserError(
        f'a checkpoint could not be written to {str(self._directory)!r}: make '
        f'room there or give another --workdir ({_first_line(error)}).'
      ) from error

  def restore(
    self, params: Any, optimizer: Any, say: Callable[[str], None]
  ) -> tuple[int, Any, Any, Any] | None:
    """The newest checkpoint that is whole.

    A damaged one is moved to `damaged/` in the workdir and the one before it
    is tried.

    Args:
      params: abstract parameters with the shardings to restore to.
      optimizer: likewise, of what was saved as `optimizer`.
      say: gets a sentence about each checkpoint that could not be read.

    Returns:
      step, params, optimizer, record; None if there is no checkpoint.

    Raises:
      UserError: there are checkpoints, but none that can be read, or they have
        other arrays.
    """
    steps = self.steps()
    for step in reversed(steps):
      loaded, trouble = self._load(step, params, optimizer)
      if not trouble:
        return step, *loaded
      say(
        f'The checkpoint of step {step} is damaged ({trouble}); it was moved '
        f'to {str(self._set_aside(step))!r}.'
      )
    if steps:
      raise UserError(
        f'none of the checkpoints of steps {steps} could be read: see the '
        'sentences above, or give another --workdir to start anew.'
      )
    return None

  def _load(
    self, step: int, params: Any, optimizer: Any
  ) -> tuple[tuple | None, str]:
    """What was saved, and what is wrong with it (nothing: '')."""
    abstract = {PARAMS: params, OPTIMIZER: optimizer}
    try:
      metadata = self._checkpointer.checkpointables_metadata(step)
      saved = _opened(metadata.custom_metadata)
      expected, record = saved['fingerprints'], saved['record']
      self._check_structure(step, len(expected), abstract)
      arrays = self._checkpointer.load_checkpointables(step, abstract)
    except UserError:
      raise
    except Exception as error:  # Orbax has no type for 'damaged'.
      return None, _first_line(error)
    if np.asarray(_fingerprints(arrays)).tolist() != expected:
      return None, 'its arrays differ from those that were saved'
    return (arrays[PARAMS], arrays[OPTIMIZER], record), ''

  def _check_structure(self, step: int, num_saved: int, abstract: Any) -> None:
    """Tells another optimizer's state from a damaged one."""
    num_expected = len(jax.tree.leaves(abstract))
    if num_saved != num_expected:
      raise UserError(
        f'the checkpoint of step {step} in {str(self._directory)!r} has '
        f'{num_saved} arrays where this run has {num_expected}: it is of '
        'another optimizer or of an older jaxsparse, so go on with that or '
        'give another --workdir.'
      )

  def _set_aside(self, step: int) -> epath.Path:
    source = self._directory / str(step)
    target = self._directory.parent / 'damaged' / str(step)
    self._checkpointer.close()
    if hosts.is_lead():
      while target.exists():
        target = target.with_name(target.name + '_')
      target.parent.mkdir(exist_ok=True)
      source.rename(target)
    hosts.wait_for_all(f'set aside {step}')
    self._open()
    return target


def load_params(
  workdir: epath.PathLike, step: int | None = None
) -> tuple[int, Any]:
  """The parameters of a checkpoint, whole, on the default device.

  Args:
    workdir: of a training run.
    step: which checkpoint; None takes the newest.

  Returns:
    The step and the parameters.

  Raises:
    UserError: there is no such checkpoint, or it can't be read.
  """
  directory = _checkpoints_folder(workdir)
  if not directory.exists():
    raise UserError(
      f'workdir {str(workdir)!r} holds no checkpoints yet: train first.'
    )
  with ocp.training.Checkpointer(directory) as checkpointer:
    steps = sorted(c.step for c in checkpointer.checkpoints)
    if not steps or step not in (None, *steps):
      raise UserError(
        f'workdir {str(workdir)!r} has no checkpoint of step {step}: it has '
        f'{steps or "none"}.'
      )
    step = steps[-1] if step is None else step
    try:
      metadata = checkpointer.checkpointables_metadata(step).metadata[PARAMS]
      device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      abstract = jax.tree.map(
        lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device),
        metadata,
      )
      loaded = checkpointer.load_checkpointables(step, {PARAMS: abstract})
    except Exception as error:
      raise UserError(
        f"the checkpoint of step {step} in {str(workdir)!r} can't be read "
        f'({_first_line(error)}): choose another of {steps} by --step.'
      ) from error
  return step, loaded[PARAMS]


def read_record(workdir: epath.PathLike) -> dict | None:
  """What the loop wrote beside the arrays of the newest checkpoint.

  Nothing in the workdir changes, and no array is read. A damaged record is
  passed over for the one before it; None if there is none.
  """
  directory = _checkpoints_folder(workdir)
  for step in reversed(_steps_in(directory)):
    try:
      found = ocp.checkpointables_metadata(directory / str(step))
      return _opened(found.custom_metadata)['record']
    except Exception:  # Orbax has no type for 'damaged'.
      continue
  return None


def _steps_in(directory: epath.Path) -> list[int]:
  """Steps of the complete checkpoints in a folder, oldest first."""
  if not directory.is_dir():
    return []
  # The names of v1 read what a step says of itself, which may be damaged.
  names = step_names.standard_name_format()
  return sorted(found.step for found in names.find_all(directory))


def _checkpoints_folder(workdir: epath.PathLike) -> epath.Path:
  path = epath.Path(workdir)
  if not workdir_lib.is_remote(workdir):
    # Orbax takes no relative path, and says so only when it writes.
    path = path.resolve()
  # Its library in C++ has no other names for files.
  require_utf8('the path of the workdir', str(path))
  return path / workdir_lib.CHECKPOINTS


def check_disk_space(workdir: epath.PathLike, num_bytes: int) -> None:
  """Refuses to start a run whose checkpoints would not fit a local disk.

  Args:
    workdir: an existing folder; remote ones are not checked.
    num_bytes: of the checkpoints that stand there at one time.

  Raises:
    UserError: there is less room than `num_bytes`.
  """
  if workdir_lib.is_remote(workdir):
    return
  free = shutil.disk_usage(workdir).free
  if free < num_bytes:
    raise UserError(
      f'workdir {str(workdir)!r} has {free / 2**20:.0f} MiB free, but its '
      f'checkpoints need {num_bytes / 2**20:.0f} MiB: make room, lower '
      'train.keep_checkpoints, or give another --workdir.'
    )


def _sealed(metadata: dict) -> dict:
  """The metadata with a digest of themselves."""
  return metadata | {'digest': _digest(metadata)}


def _opened(sealed: dict) -> dict:
  """What was sealed; older checkpoints have no digest.

  Raises:
    ValueError: it is no longer what was sealed.
  """
  metadata = {k: v for k, v in sealed.items() if k != 'digest'}
  if sealed.get('digest', _digest(metadata)) != _digest(metadata):
    raise ValueError('its record differs from the one that was saved')
  return metadata


def _digest(metadata: dict) -> str:
  # As JSON reads it back: with strings for keys, which decide their order.
  plain = json.loads(json.dumps(metadata))
  return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@jax.jit
def _fingerprints(tree: Any) -> jax.Array:
  """Each leaf's bits, summed modulo 2^32: the same under every sharding."""

  def fingerprint(x: jax.Array) -> jax.Array:
    bits = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
    words = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    return jnp.sum(words, dtype=jnp.uint32)

  return jnp.stack([fingerprint(x) for x in jax.tree.leaves(tree)])


def _is_disk_trouble(error: BaseException | None) -> bool:
  """Whether `error` or one of its causes is the file system's refusal."""
  while error is not None:
    text = str(error)
    if isinstance(error, OSError) or any(
      sign in text
      for sign in ('No space left', 'RESOURCE_EXHAUSTED', 'Permission denied')
    ):
      return True
    error = error.__cause__ or error.__context__
  return False


def _first_line(error: BaseException) -> str:
  lines = str(error).strip('\'" ').splitlines() or [type(error).__name__]
  return lines[0][:160].rstrip('. ')
