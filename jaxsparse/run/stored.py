# SPDX-License-Identifier: Apache-2.0
"""How a checkpoint is read: compared with what was saved.

Orbax notices missing and truncated files, but not a flipped bit inside a value.
So a checkpoint has a fingerprint of every array and a digest of all else that a
resume reads. Besides `checkpoint`, this is the only importer of Orbax.
"""

import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath
from orbax.checkpoint.experimental import v1 as ocp
from orbax.checkpoint.path import step as step_names

from jaxsparse.config.errors import UserError, require, require_utf8
from jaxsparse.run import fingerprints, provenance, table_leaves
from jaxsparse.run import workdir as workdir_lib

# What each checkpoint is made of; `params` stands alone so that inference
# reads nothing else.
PARAMS, OPTIMIZER = 'params', 'optimizer'

# In the record of a checkpoint with quantized leaves: what each of them is.
QUANTIZED = 'quantized'


class DamageError(Exception):
  """What is wrong with a checkpoint."""


def folder_of(workdir: epath.PathLike) -> epath.Path:
  path = epath.Path(workdir)
  if not workdir_lib.is_remote(workdir):
    # Orbax takes no relative path, and says so only when it writes.
    path = path.resolve()
  # Its library in C++ has no other names for files.
  require_utf8('the path of the workdir', str(path))
  return path / workdir_lib.CHECKPOINTS


def steps_in(workdir: epath.PathLike) -> list[int]:
  """Steps of the complete checkpoints of a workdir, oldest first."""
  folder = folder_of(workdir)
  if not folder.is_dir():
    return []
  # The names of Orbax v1 read what a step says of itself, which may be damaged.
  names = step_names.standard_name_format()
  return sorted(found.step for found in names.find_all(folder))


def digest(workdir: epath.PathLike, step: int) -> str:
  """SHA-256 of what a checkpoint says of its arrays and of its run.

  Raises:
    UserError: the checkpoint can't be read.
  """
  path = folder_of(workdir) / str(step)
  try:
    return fingerprints.digest(ocp.metadata(path, PARAMS).custom_metadata)
  except Exception as error:  # Orbax has no type for 'damaged'.
    raise UserError(
      f"the checkpoint {str(path)!r} can't be read ({first_line(error)})."
    ) from error


def params_fingerprint(workdir: epath.PathLike, step: int) -> str:
  """A hash of a checkpoint's parameters; copies of it have the same.

  It is one of what the checkpoint says of them, so no array is read.

  Raises:
    UserError: the checkpoint can't be read.
  """
  path = folder_of(workdir) / str(step)
  try:
    found = ocp.metadata(path, PARAMS)
    saved = fingerprints.unseal(found.custom_metadata)
  except Exception as error:  # Orbax has no type for 'damaged'.
    raise UserError(
      f"the checkpoint {str(path)!r} can't be read ({first_line(error)})."
    ) from error
  leaves = saved['fingerprints']
  of_params = leaves if isinstance(leaves, list) else leaves[PARAMS]
  return fingerprints.digest(
    [of_params, saved['record'].get(table_leaves.ON_FILE)]
  )


def read(
  folder: epath.Path,
  step: int,
  abstract: dict[str, Any] | None,
  others: Sequence[dict[str, Any]] = (),
) -> tuple[dict[str, Any], Any]:
  """The arrays and the record of a checkpoint, as they were saved.

  Nothing in the folder changes.

  Args:
    folder: of the checkpoints, in the workdir.
    step: of one of them.
    abstract: trees to restore to, by item, all of them or the parameters
      alone; None stands for the latter, whole, on every device of the mesh in
      use, or on the default device. What has no optimizer's state is restored
      without. Parameters alone may lack tables that the checkpoint has.
    others: `abstract` as earlier versions or other types of activations have
      it; a checkpoint that has one of these is restored to it.

  Returns:
    The trees by item, and the record.

  Raises:
    DamageError: it is not what was saved.
    UserError: it is, but of another model, tokenizer or optimizer, or it is to
      be trained and quantized.
  """
  path, context = folder / str(step), ocp.Context()
  try:
    found = ocp.metadata(path, PARAMS)
    saved = fingerprints.unseal(found.custom_metadata)
    provenance.check(saved['record'], folder.parent)
    expected = saved['fingerprints']
    if abstract and OPTIMIZER in abstract and QUANTIZED in saved['record']:
      raise UserError(
        f'the checkpoint {str(path)!r} is quantized, which no training goes on '
        'from: train the model that it was made of.'
      )
    if abstract is not None and table_leaves.ON_FILE in saved['record']:
      # These are not among the arrays.
      rest, _ = table_leaves.split(abstract[PARAMS])
      abstract = abstract | {PARAMS: rest}
    if abstract is None:
      abstract = {PARAMS: _whole(found.metadata)}
    else:
      if not _has_optimizer(expected):
        abstract, others = {PARAMS: abstract[PARAMS]}, ()
      fitting = (x for x in others if _fits(expected, x))
      abstract = next(fitting, abstract)
      if OPTIMIZER not in abstract and isinstance(expected, dict):
        expected = _without_tables(expected, abstract)
        context.pytree.loading.partial_load = True
      _check_structure(path, _of(abstract, expected), abstract)
    with context, warnings.catch_warnings():
      # Where each array is to lie has been said.
      warnings.filterwarnings('ignore', 'Sharding info not provided')
      arrays = ocp.load_checkpointables(path, abstract)
  except UserError:
    raise
  except Exception as error:  # Orbax has no type for 'damaged'.
    raise DamageError(first_line(error)) from error
  _compare(expected, arrays)
  return arrays, saved['record']


def read_some(
  folder: epath.Path, step: int, choose: Callable[[str], bool]
) -> tuple[dict, Any]:
  """Some of the parameters of a checkpoint on the default device.

  Args:
    folder: of the checkpoints, in the workdir.
    step: of one of them.
    choose: says of a leaf's path, such as 'embed/table', whether it is read.

  Returns:
    The parameters without the other leaves, and the record.

  Raises:
    DamageError: they are not what was saved.
    UserError: they are of another model or tokenizer, or of version 0.1.
  """
  path = folder / str(step)
  try:
    found = ocp.metadata(path, PARAMS)
    saved = fingerprints.unseal(found.custom_metadata)
    provenance.check(saved['record'], folder.parent)
    _require_leaves(path, saved['fingerprints'])
    some = _chosen(_on_one_device(found.metadata), choose)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context, warnings.catch_warnings():
      warnings.filterwarnings('ignore', 'Sharding info not provided')
      arrays = ocp.load_checkpointables(path, {PARAMS: some})
  except (UserError, DamageError):
    raise
  except Exception as error:  # Orbax has no type for 'damaged'.
    raise DamageError(first_line(error)) from error
  expected = saved['fingerprints'][PARAMS]
  names = fingerprints.of_types(some)
  _compare({PARAMS: {name: expected.get(name) for name in names}}, arrays)
  return arrays[PARAMS], saved['record']


def fingerprints_of(folder: epath.Path, step: int) -> dict[str, list]:
  """Of each parameter of a checkpoint; nothing of the arrays is read.

  Raises:
    DamageError: it can't be read.
    UserError: it is of version 0.1, which had none by leaf.
  """
  try:
    found = ocp.metadata(folder / str(step), PARAMS)
    saved = fingerprints.unseal(found.custom_metadata)['fingerprints']
  except Exception as error:  # Orbax has no type for 'damaged'.
    raise DamageError(first_line(error)) from error
  _require_leaves(folder / str(step), saved)
  return saved[PARAMS]


def _require_leaves(path: epath.Path, expected: dict | list) -> None:
  require(
    not isinstance(expected, list),
    f'the checkpoint {str(path)!r} is of jaxsparse 0.1, which is read as a '
    "whole: leave its tables where they are, by tables = ''.",
  )


def tables_on_file(folder: epath.Path, step: int) -> str | None:
  """The digest of a checkpoint's tables, if it has them elsewhere.

  Raises:
    DamageError: it can't be read.
  """
  try:
    found = ocp.metadata(folder / str(step), PARAMS)
    record = fingerprints.unseal(found.custom_metadata)['record']
  except Exception as error:  # Orbax has no type for 'damaged'.
    raise DamageError(first_line(error)) from error
  return record.get(table_leaves.ON_FILE)


def steps_with_tables(workdir: epath.PathLike) -> list[int]:
  """Steps of the checkpoints that have, or may have, their tables elsewhere."""

  def has_tables(step: int) -> bool:
    try:
      return tables_on_file(folder_of(workdir), step) is not None
    except DamageError:
      return True

  return [step for step in steps_in(workdir) if has_tables(step)]


def shapes_of(folder: epath.Path, step: int) -> dict[str, jax.ShapeDtypeStruct]:
  """Of each parameter of a checkpoint, by its path."""
  found = ocp.metadata(folder / str(step), PARAMS)
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): x
    for path, x in jax.tree.leaves_with_path(_on_one_device(found.metadata))
  }


def _chosen(tree: dict, choose: Callable[[str], bool], place: str = '') -> dict:
  """The leaves that are chosen, and the dicts that lead to them."""
  found = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      if inner := _chosen(value, choose, f'{place}{name}/'):
        found[name] = inner
    elif choose(place + name):
      found[name] = value
  return found


def _whole(metadata: Any) -> Any:
  """On every device of the mesh in use; of none, on the default device."""
  used = jax.sharding.get_mesh()
  if used.size <= 1:
    return _on_one_device(metadata)
  everywhere = jax.NamedSharding(used, jax.P())
  return jax.tree.map(
    lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=everywhere),
    metadata,
  )


def _on_one_device(metadata: Any) -> Any:
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), metadata
  )


def _has_optimizer(expected: dict | list) -> bool:
  # The lists of older checkpoints are of both.
  return isinstance(expected, list) or OPTIMIZER in expected


def _of(abstract: dict[str, Any], expected: dict | list) -> dict | list:
  """The fingerprints of what is to be read."""
  if isinstance(expected, list):
    # `params` are last.
    num_leaves = len(jax.tree.leaves(abstract))
    return expected[-num_leaves:] if OPTIMIZER not in abstract else expected
  return {item: of for item, of in expected.items() if item in abstract}


def _without_tables(expected: dict, abstract: dict[str, Any]) -> dict:
  """The fingerprints without those of tables that are not to be read."""
  own = fingerprints.of_types(abstract[PARAMS])
  return {
    PARAMS: {
      name: of
      for name, of in expected[PARAMS].items()
      if name in own or name.rpartition('/')[2] not in table_leaves.NAMES
    }
  }


def _compare(expected: dict | list, arrays: dict[str, Any]) -> None:
  if isinstance(expected, list):
    # Of an older checkpoint, in the order of the whole tree: `params` are last.
    found = fingerprints.sums(arrays)
    if found != expected[len(expected) - len(found) :]:
      raise DamageError('its arrays differ from those that were saved')
    return
  for item, tree in arrays.items():
    found = fingerprints.of_arrays(tree)
    for name in found | expected[item]:
      if found.get(name) != expected[item].get(name):
        raise DamageError(f'{item}/{name} differs from what was saved')


def _check_structure(
  path: epath.Path, expected: dict | list, abstract: dict[str, Any]
) -> None:
  """Distinguishes another optimizer's state from a damaged one."""
  if _fits(expected, abstract):
    return
  here = fingerprints.of_types(abstract)
  if isinstance(expected, list):
    num_saved, which = len(expected), ''
  else:
    there = _types(expected)
    name = min(k for k in there | here if there.get(k) != here.get(k))
    num_saved = len(there)
    which = (
      f' ({name} is {there.get(name, "not there")} and '
      f'{here.get(name, "not here")})'
    )
  raise UserError(
    f'the checkpoint {str(path)!r} has {num_saved} arrays where this run has '
    f'{len(here)}{which}: it is of another optimizer or of an older jaxsparse, '
    'so go on with that or give another --workdir.'
  )


def _fits(expected: dict | list, abstract: dict[str, Any]) -> bool:
  """Whether these are the types and shapes that were saved."""
  here = fingerprints.of_types(abstract)
  if isinstance(expected, list):
    return len(expected) == len(here)
  return _types(expected) == here


def _types(expected: dict) -> dict[str, str]:
  return {
    f'{item}/{name}': of[0]
    for item, leaves in expected.items()
    for name, of in leaves.items()
  }


def first_line(error: BaseException) -> str:
  """Of what it began with: what others made of that names their classes."""
  while error.__cause__ is not None:
    error = error.__cause__
  lines = str(error).strip('\'" ').splitlines() or [type(error).__name__]
  return textwrap.shorten(lines[0], 160, placeholder=' ...').rstrip('. ')
