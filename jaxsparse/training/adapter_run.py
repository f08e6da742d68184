# SPDX-License-Identifier: Apache-2.0
"""A run that trains an adapter leaves it in files, too."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxsparse import mesh
from jaxsparse.config import Config
from jaxsparse.config.errors import UserError
from jaxsparse.nn import adapters as adapter_trees
from jaxsparse.nn import row_deltas
from jaxsparse.run import adapter_files, hosts, start
from jaxsparse.run.progress import Reporter
from jaxsparse.training import adapters, trained_rows


def begin(
  config: Config,
  workdir: epath.PathLike,
  base: dict,
  begun_from: start.Start,
  ranked_by: trained_rows.Texts | None,
  reporter: Reporter,
) -> dict:
  """The base as the adapter stands beside it, after a sentence about both.

  Args:
    config: of the run.
    workdir: of it.
    base: parameters on the mesh in use.
    begun_from: where they are from.
    ranked_by: what rows are ranked by, if they are trained.
    reporter: gets the sentence, and shows the progress.

  Raises:
    UserError: the base can't have such an adapter.
  """
  if config.adapter.kind == 'rows':
    args = begun_from, ranked_by, reporter
    base = trained_rows.with_rows(config, workdir, base, *args)
  reporter.say(adapters.describe(config, base))
  return base


# Writes the adapter after so many steps.
Write = Callable[[int, dict], None]


def writer(
  config: Config,
  workdir: epath.PathLike,
  base: start.Start | None,
  frozen: dict,
  state: Any,
) -> Write:
  """`write` of a run; nothing is written if it trains no adapter.

  A run that goes on from a checkpoint writes at once what is not of it: a kill
  may have come between the two, or someone removed or damaged it.

  Args:
    config: of the run.
    workdir: its folder.
    base: what it stands beside.
    frozen: its parameters.
    state: what the run goes on from, a `TrainState`.

  Raises:
    UserError: it can't be written.
  """
  if not config.adapter.kind:
    return lambda step, adapter: None
  assert base is not None
  step = int(state.step)
  # All processes see what process 0 does.
  if step and not hosts.gather(_is_written(config, workdir, step))[0]:
    write(config, workdir, base, frozen, step, state.params)
  return functools.partial(write, config, workdir, base, frozen)


def _is_written(config: Config, workdir: epath.PathLike, step: int) -> bool:
  try:
    folder = adapter_files.folder_of(workdir, config.adapter.name)
    _, meta = adapter_files.read(folder)
  except UserError:
    return False
  return meta.get('steps') == step


def write(
  config: Config,
  workdir: epath.PathLike,
  base: start.Start,
  frozen: dict,
  step: int,
  adapter: dict,
) -> None:
  """Writes the adapter to the workdir's adapters/, over an earlier one.

  Args:
    config: of the run.
    workdir: its folder.
    base: what it stands beside.
    frozen: its parameters.
    step: steps done.
    adapter: on any mesh; all processes call.

  Raises:
    UserError: it can't be written.
  """
  spec = None if mesh.axis_sizes() is None else jax.P()
  whole = jax.jit(
    lambda tree: jax.tree.map(lambda x: mesh.reshard(x, spec), tree)
  )(adapter)
  # Old rows of a table are read by all processes.
  if config.adapter.kind == 'rows':
    tensors = row_deltas.to_tensors(row_deltas.with_values(frozen, whole))
  else:
    tensors = {
      '/'.join(path): np.asarray(x)
      for path, x in adapter_trees.leaves(whole).items()
    }
  if not hosts.is_process_zero():
    return
  meta = dict(
    kind=config.adapter.kind,
    base=base.fingerprint,
    base_step=base.step,
    steps=step,
    text=config.data.text or config.data.tfds,
    **config.adapter.to_json(),
  )
  folder = adapter_files.folder_of(workdir, config.adapter.name)
  adapter_files.write(folder, tensors, meta)
