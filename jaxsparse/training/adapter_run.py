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
from jaxsparse.run import adapter_files, hosts, start

# Writes the adapter after so many steps.
Write = Callable[[int, dict], None]


def writer(
  config: Config, workdir: epath.PathLike, base: start.Start | None
) -> Write | None:
  """`write` of a run; None if it trains no adapter."""
  if not config.adapter.kind:
    return None
  assert base is not None
  return functools.partial(write, config, workdir, base)


def write(
  config: Config,
  workdir: epath.PathLike,
  base: start.Start,
  step: int,
  adapter: dict,
) -> None:
  """Writes the adapter to the workdir's adapters/, over an earlier one.

  Args:
    config: of the run.
    workdir: its folder.
    base: what it stands beside.
    step: steps done.
    adapter: on any mesh; all processes call.

  Raises:
    UserError: it can't be written.
  """
  spec = None if mesh.axis_sizes() is None else jax.P()
  whole = jax.jit(
    lambda tree: jax.tree.map(lambda x: mesh.reshard(x, spec), tree)
  )(adapter)
  if not hosts.is_process_zero():
    return
  tensors = {
    '/'.join(path): np.asarray(x)
    for path, x in adapter_trees.leaves(whole).items()
  }
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
