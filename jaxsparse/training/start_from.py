# SPDX-License-Identifier: Apache-2.0
"""A run that begins with the parameters of another: `train.start_from`.

Nothing is drawn but what the other model lacks, and no step, moment or place in
a text is taken over. When the run has a checkpoint, it needs the other workdir
no more.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from jaxsparse import mesh
from jaxsparse.config import Config, ModelConfig, saved_config
from jaxsparse.config.errors import UserError, require
from jaxsparse.data import tokenizer_roles
from jaxsparse.nn import added_parts, row_deltas
from jaxsparse.nn.parameter import is_quantized
from jaxsparse.nn.transformer import init_params
from jaxsparse.run import (
  checkpoint,
  fingerprints,
  hosts,
  mapped_tables,
  run_config,
  start,
  table_files,
  table_leaves,
)
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.stored import QUANTIZED
from jaxsparse.training import first_rows, resume


def begin(
  config: Config, workdir: epath.PathLike, say: Callable[[str], None]
) -> Config:
  """Settles where a new run's parameters are from, and brings the tokenizer.

  Args:
    config: of this start.
    workdir: of the run; one that has begun stays as it is.
    say: gets a sentence about it.

  Returns:
    The config, with the other model's number of tokens if it names none.

  Raises:
    UserError: there is no such checkpoint, or its parameters are not the
      model's.
  """
  is_begun = (epath.Path(workdir) / workdir_lib.CONFIG).exists()
  if is_begun or not config.train.start_from:
    return config
  found = start.source(config)
  old = run_config.read(found.workdir, say)
  model = config.model.with_vocabulary(old.model.vocab_size)
  config = dataclasses.replace(config, model=model)
  _require_trainable(config, found)
  told = differences(old.model, model, found.workdir, bool(config.adapter.kind))
  merged = ', its adapter merged into its base' if old.adapter.kind else ''
  say(f'Beginning with step {found.step} of {found.workdir!r}{merged}{told}.')
  if old.adapter.kind and config.adapter.kind:
    say(
      f'adapter.kind = {config.adapter.kind!r}: a new adapter is trained '
      'beside both, which stay as they are; with --config.adapter.kind= all '
      'parameters are trained.'
    )
  if hosts.is_process_zero():
    _bring_tokenizer(config, old, found, workdir)
  start.settle(config, workdir)
  return config


def _require_trainable(config: Config, found: start.Start) -> None:
  memory = config.model.memory
  require(
    not (config.adapter.kind and config.model.has_tables_on_file),
    "model.memory.table.store must be 'device' with adapter.kind, got "
    f'{memory and memory.table.store!r}.',
  )
  record = checkpoint.read_record(found.workdir) or {}
  require(
    QUANTIZED not in record or bool(config.adapter.kind),
    f'train.start_from = {found.workdir!r} is quantized, which no training '
    'begins with but that of an adapter: name the workdir that it was made of.',
  )
  require(
    QUANTIZED in record or not _is_beside_quantized(found.workdir),
    f'train.start_from = {found.workdir!r} is an adapter beside a base in '
    'fewer bits, which no training begins with: name its base, or make a model '
    'of both by convert to-hf and convert from-hf.',
  )


def _is_beside_quantized(workdir: str) -> bool:
  """Whether a workdir holds a quantized model, or an adapter beside one."""
  record = checkpoint.read_record(workdir) or {}
  config = start.adapted(record)
  if config is None:
    return QUANTIZED in record
  base = start.base_of(workdir, record)
  return bool(config.adapter.quantize) or _is_beside_quantized(base.workdir)


def _bring_tokenizer(
  config: Config, old: Config, found: start.Start, workdir: epath.PathLike
) -> None:
  if not workdir_lib.has_tokenizer(found.workdir):
    require(
      config.data.tokenizer not in ('bytes', 'bpe'),
      f'{found.workdir!r} of train.start_from has no tokenizer: put its '
      f'{" or ".join(workdir_lib.TOKENIZERS)} there, or name it by '
      '--config.data.tokenizer=FILE.',
    )
    return
  with workdir_lib.write_errors(workdir):
    tokenizer_roles.copy_tokenizer(found.workdir, workdir)
  named = config.data.tokenizer
  is_own = named in ('bytes', 'bpe', old.data.tokenizer)
  require(
    is_own or not resume.has_other_tokenizer(config, None, workdir),
    f'data.tokenizer = {named!r} is not the one that '
    f'{found.workdir!r} of train.start_from was trained with: leave it out.',
  )


def differences(
  old: ModelConfig, new: ModelConfig, workdir: str, is_adapted: bool = False
) -> str:
  """How a model differs from the one whose parameters it takes, for a sentence.

  Args:
    old: the other model.
    new: that of the run.
    workdir: of the other.
    is_adapted: whether the parameters are to stay, beside an adapter.

  Raises:
    UserError: a parameter has another shape, or no place, or a new part would
      not begin silent.
  """
  added_parts.require_silent(old, new)
  here, there = (_shapes(model) for model in (new, old))
  for name, shape in there.items():
    own = here.get(added_parts.copied_to(old, new, name))
    is_copied = added_parts.copied_to(old, new, name) != name
    require(
      own is not None,
      f'train.start_from must name a model whose parameters all have a place '
      f'here, but {name} of {workdir!r} has none.',
    )
    require(
      is_copied or own == shape,
      f'train.start_from must name a model of the same shapes, but {name} is '
      f'{shape} in {workdir!r} and {own} here.',
    )
  require(
    not is_adapted or len(here) == len(there),
    'the model must be that of train.start_from with adapter.kind, which is '
    f'never written, but parts are new beside {workdir!r}: leave them out.',
  )
  changed = saved_config.differences(old, new, 'model')
  told = [
    f'{name} is new' if before is None else f'{name}: {before!r} -> {after!r}'
    for name, (before, after) in changed.items()
  ]
  return f'; its model differs here ({", ".join(told)})' if told else ''


def _shapes(model: ModelConfig) -> dict[str, list[int]]:
  shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
  return {
    name: list(x.shape)
    for name, x in zip(
      fingerprints.of_types(shapes), jax.tree.leaves(shapes), strict=True
    )
  }


# Gives step and parameters of a checkpoint, as `checkpoint.load_params`.
Read = Callable[..., tuple[int, Any]]


def given_tables(found: start.Start) -> first_rows.Given:
  """The tables that a run with tables on file begins with.

  Raises:
    UserError: the base of an adapter is gone, or another by now.
  """
  return first_rows.Given(_readers(found), is_extended=True)


def _readers(found: start.Start) -> dict[str, Callable[[], np.ndarray]]:
  """What reads the tables of a checkpoint; of an adapter's those of its base,
  with the differences of rows in them.
  """
  record = checkpoint.read_record(found.workdir) or {}
  config = start.adapted(record)
  if config is None:
    return mapped_tables.readers(found.workdir, found.step)
  rows = _readers(start.base_of(found.workdir, record))
  if config.adapter.kind != 'rows':
    return rows
  _, tree = checkpoint.load_params(found.workdir, found.step)
  tensors = jax.device_get(flatten_dict(tree, sep='/'))
  return rows | {
    path: functools.partial(_with_differences, rows[path], *delta)
    for path, delta in row_deltas.unchecked(tensors).items()
  }


def _with_differences(
  read: Callable[[], np.ndarray], ids: np.ndarray, values: np.ndarray
) -> np.ndarray:
  table = np.array(read())
  table[ids] = row_deltas.changed(table[ids], values)
  return table


def load_params(
  config: Config,
  found: start.Start,
  say: Callable[[str], None],
  read: Read = checkpoint.load_params,
) -> dict:
  """The first parameters of a run, on the mesh in use; none is drawn twice.

  Without the tables where these lie on file.

  Args:
    config: of the run.
    found: what it begins with.
    say: gets a sentence if the other workdir is damaged and can be read yet.
    read: reads a checkpoint.

  Raises:
    UserError: the checkpoint is gone, damaged, or another than the run settled
      on.
  """
  used, is_on_file = jax.sharding.get_mesh(), config.model.has_tables_on_file

  def laid(model: ModelConfig) -> dict:
    params = mesh.abstract(
      lambda: init_params(model, jax.random.key(0)), mesh=used
    )
    return table_leaves.split(params)[0] if is_on_file else params

  named = dataclasses.replace(
    config.train, start_from=f'{found.workdir}@{found.step}'
  )
  now = start.source(dataclasses.replace(config, train=named))
  if now != found:
    raise UserError(
      f'step {found.step} of {found.workdir!r} is no longer what this run '
      'began with: put that checkpoint back, or give another --workdir.'
    )
  old = run_config.read(found.workdir, say)
  _, params = read(
    found.workdir,
    found.step,
    say,
    laid(old.model),
    mapped_tables.NONE if is_on_file else 'device',
  )
  if any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
    # Only read, as it is stored.
    return params
  params = added_parts.extend(
    old.model,
    config.model,
    params,
    config.train.seed,
    lambda name: is_on_file and table_files.is_table(name),
  )
  return jax.tree.map(
    lambda x, of: jax.device_put(x.astype(of.dtype), of.sharding),
    params,
    laid(config.model),
  )
