# SPDX-License-Identifier: Apache-2.0
"""A trained model for notebooks and for programs of others."""

import os
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from etils import epath

from jaxsparse import mesh
from jaxsparse.inference import adapters as adapters_lib
from jaxsparse.nn.language_model import LanguageModel
from jaxsparse.run import run_config, stored, trained

_EXPLICIT = jax.sharding.AxisType.Explicit


def load(
  workdir: epath.PathLike,
  step: int | Literal['best'] | None = None,
  axes: mesh.Axes = mesh.DEFAULT_AXES,
  adapters: epath.PathLike | Sequence[epath.PathLike] = (),
) -> tuple[LanguageModel, dict[str, Any]]:
  """The model of a workdir and its parameters; nothing is written.

  `module.apply({'params': params}, tokens)` gives logits [..., V] of tokens
  [..., T]; `module.config` is the model's config. What is read is compared with
  the fingerprints taken when it was saved. Needs the extra `train`.

  Args:
    workdir: of a training run, an import or another conversion; a local folder
      or such as gs://...
    step: which checkpoint, or 'best', the one of the lowest validation loss;
      None takes the newest that is whole.
    axes: names of your own mesh's axes, if one is in use (`jax.set_mesh`).
    adapters: the folder of one to be added, such as RUN/adapters/NAME, or those
      of several.

  Returns:
    The module and its parameters, laid on the mesh in use as the module wants
    them; with no mesh set whole on the default device.

  Raises:
    UserError: there is no such workdir or checkpoint, it can't be read, it
      belongs to another tokenizer or model, or the mesh can't split it.
  """
  config = run_config.read(workdir)
  module = LanguageModel(config.model, axes)
  at, params = adapters_lib.load_params(
    workdir, trained.step_of(workdir, step), abstract=_abstract(module)
  )
  if isinstance(adapters, str | os.PathLike):
    adapters = [adapters]
  if adapters:
    base = stored.params_fingerprint(workdir, at)
    params = adapters_lib.applied(config.model, params, adapters, base)
  return module, params


def _abstract(module: LanguageModel) -> Any:
  """Where parameters are to lie on the mesh in use; None without one."""
  used = jax.sharding.get_mesh()
  if used.empty:
    return None

  def init() -> Any:
    # Divisible however tokens are split.
    tokens = jnp.ones((used.size, 1), jnp.int32)
    return module.init(jax.random.key(0), tokens)['params']

  # How arrays lie is part of their types where axes are Explicit.
  typed = jax.sharding.Mesh(
    used.devices, used.axis_names, (_EXPLICIT,) * len(used.axis_names)
  )
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.NamedSharding(used, x.sharding.spec)
    ),
    mesh.abstract(init, mesh=typed),
  )
