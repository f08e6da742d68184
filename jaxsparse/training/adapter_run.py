# SPDX-License-Identifier: Apache-2.0
"""A run that trains an adapter leaves it in files, too."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from jaxsparse import mesh
from jaxsparse.config import Config
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
) -> Write:
  """`write` of a run; nothing is written if it trains no adapter."""
  if not config.adapter.kind:
    return lambda step, adapter: None
  assert base is not None
  return functools.partial(write, config, workdir, base, frozen)


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
