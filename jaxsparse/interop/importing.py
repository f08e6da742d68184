# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint of others to a workdir, one leaf after another.

No more than one leaf is held besides the parameters: largest leaves are read
first, when there is most room.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxsparse.config import (
  Config,
  DataConfig,
  ModelConfig,
  OptimizerConfig,
)
from jaxsparse.interop import layout as layout_lib
from jaxsparse.interop import our_leaves
from jaxsparse.interop.layout import Layout, Leaf
from jaxsparse.interop.source import Source
from jaxsparse.run import new_workdir
from jaxsparse.run.progress import Reporter

# Between two lines about an import, where no bar is shown.
_SECONDS = 10.0

# Of training that goes on: a tenth and less of that from nothing.
_LEARNING_RATE = 2e-5


@dataclasses.dataclass(frozen=True)
class Opened:
  """A checkpoint of others whose config has been understood.

  Attributes:
    source: its tensors.
    layout: where our leaves lie in them.
    config: of the model, with vocab_size set.
    length: tokens of the sequences that it was trained with.
    family: what it is, such as 'llama'.
    origin: where it is from, plain JSON; the workdir keeps it.
    write_tokenizer: puts its tokenizer into a workdir, and says in a sentence
      what it did.
    notes: sentences about what was found in it.
  """

  source: Source
  layout: Layout
  config: ModelConfig
  length: int
  family: str
  origin: dict[str, Any]
  write_tokenizer: Callable[[epath.PathLike], str]
  notes: tuple[str, ...] = ()


def import_model(
  opened: Opened,
  workdir: epath.PathLike,
  dtype: str = 'float32',
  reporter: Reporter | None = None,
) -> int:
  """Makes a new workdir of a checkpoint of others.

  Names and shapes of all tensors are compared before one is read, and nothing
  is left in the workdir if something fails.

  Args:
    opened: the checkpoint.
    workdir: a folder that is missing or empty.
    dtype: of the activations; parameters are float32 in any case.
    reporter: shows how far it is.

  Returns:
    The number of parameters.

  Raises:
    UserError: tensors and config do not fit, a tensor is damaged, or the
      workdir can't be written.
  """
  reporter = reporter or Reporter(is_silent=True)
  new_workdir.require_new(workdir)
  layout_lib.check(opened.source, opened.layout)
  model = dataclasses.replace(opened.config, dtype=dtype)
  config = Config(
    model=model,
    data=DataConfig(seq_len=opened.length),
    optimizer=OptimizerConfig(learning_rate=_LEARNING_RATE),
  )
  for note in opened.notes:
    reporter.say(note)
  devices = our_leaves.mesh_for(model)
  with new_workdir.emptied_on_failure(workdir):
    reporter.say(opened.write_tokenizer(workdir))
    params = read_params(opened.source, opened.layout, model, devices, reporter)
    reporter.say('Writing the checkpoint ...')
    with jax.set_mesh(devices):
      new_workdir.write(workdir, config, params, opened.origin)
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def read_params(
  source: Source,
  layout: Layout,
  model: ModelConfig,
  devices: jax.sharding.Mesh,
  reporter: Reporter,
) -> dict[str, Any]:
  """The parameters, float32, each spread over the mesh as it is read.

  Raises:
    UserError: a tensor can't be read, or holds what is no number.
  """
  abstract = our_leaves.abstract(model, devices)
  if abstract.keys() != layout.keys():
    raise ValueError(
      f'{sorted(abstract.keys() ^ layout.keys())} are not in the model or have '
      'no place in the layout.'
    )
  total = sum(leaf.size for leaf in abstract.values())
  done, said, found = 0, time.monotonic(), {}
  with reporter.steps(0, total, 'parameters imported', False, 'parameters'):
    for name in sorted(abstract, key=lambda name: -abstract[name].size):
      found[name] = _placed(source, name, layout[name], abstract[name])
      done += abstract[name].size
      is_late = time.monotonic() - said > _SECONDS
      said = time.monotonic() if is_late else said
      reporter.show(done, total, {}, is_logged=is_late)
  return our_leaves.nested(found)


def _placed(
  source: Source, name: str, leaf: Leaf, abstract: jax.ShapeDtypeStruct
) -> jax.Array:
  """The leaf on its devices."""
  whole = layout_lib.read(source, leaf)
  if whole.shape != abstract.shape:
    raise ValueError(
      f'{name} is {abstract.shape}, but its layout makes {whole.shape}.'
    )
  return jax.make_array_from_callback(
    whole.shape,
    abstract.sharding,
    lambda index: np.ascontiguousarray(whole[index], abstract.dtype),
  )
