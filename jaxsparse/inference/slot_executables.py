# SPDX-License-Identifier: Apache-2.0
"""The executables of slots, by name; each is made at most once in a process."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxsparse import mesh
from jaxsparse.config.errors import require
from jaxsparse.inference import slot_functions, slot_sampling
from jaxsparse.inference.jobs import JobSampling
from jaxsparse.inference.slot_model import SlotModel
from jaxsparse.inference.slots import rows_of_bounded

# Kinds of slots whose executables are kept for who needs the same ones.
_MOST_KINDS = 4


def of(
  model: SlotModel,
  params: dict,
  num_slots: int,
  num_rows: int,
  chunks: tuple[int, ...],
  stop_ids: tuple[int, ...],
  of_picture: dict,
) -> 'Executables':
  """Those of such slots, whatever the parameters' values are.

  Args:
    model: that writes.
    params: on one device, or on a mesh of shape (1, 1, n).
    num_slots: sequences at once.
    num_rows: rows of each, a multiple of the longest chunk.
    chunks: tokens that are read at once, falling.
    stop_ids: tokens that end an answer.
    of_picture: parameters of a model that sees, see `SlotModel.see`.

  Raises:
    UserError: the mesh splits sequences.
  """
  devices = _mesh_of(params)

  def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    sharding = None if devices is None else x.sharding
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  both = params, of_picture
  leaves, structure = jax.tree.flatten(jax.tree.map(abstract, both))
  return _kept(
    model, devices, tuple(leaves), structure, num_slots, num_rows, chunks,
    stop_ids, jax.default_backend(),
  )  # fmt: skip


@functools.lru_cache(_MOST_KINDS)
def _kept(model, devices, leaves, structure, *sizes):
  both = jax.tree.unflatten(structure, leaves)
  return Executables(model, devices, *both, *sizes)


def words(vocab_size: int) -> int:
  """Words of a mask over all tokens."""
  return -(-vocab_size // 32)


class Executables(dict):
  """Executables by name, compiled when asked for if not before.

  Attributes:
    names: of all that there can be.
  """

  def __init__(
    self,
    model: SlotModel,
    devices: jax.sharding.Mesh | None,
    params: dict,
    of_picture: dict,
    num_slots: int,
    num_rows: int,
    chunks: tuple[int, ...],
    stop_ids: tuple[int, ...],
    backend: str,
  ):
    """As `of`; parameters are abstract, on the mesh `devices` if it is one."""
    super().__init__()
    self._devices, self._backend = devices, backend
    if devices is not None:
      _check(devices)
    abstract, f = self._abstract, slot_functions
    config, settings = model.config, model.settings
    size = words(config.vocab_size)
    number, flag = abstract((), np.int32), abstract((), np.bool_)
    live = abstract((num_slots,), np.bool_)
    of_all, of_one = (abstract((n, size), np.uint32) for n in (num_slots, 1))
    init = functools.partial(f.init, model, num_slots, num_rows)
    snapshot = functools.partial(f.snapshot, model, chunks[0])
    insert = functools.partial(f.insert, model, chunks[0])
    state = self._evaluated(init)
    taken = self._evaluated(snapshot, state, number, number)
    fields = jax.tree.map(
      lambda x: abstract(x.shape, x.dtype), slot_sampling.of_job(JobSampling())
    )
    of_model = dict(model=model, stop_ids=stop_ids)
    wanted = dict(
      init=(init,),
      start=(f.start, state, number, fields, number),
      snapshot=(snapshot, state, number, number),
      insert=(insert, state, number, number, taken),
    )
    for form in ('plain', 'sorted', 'logprobs'):
      decode = functools.partial(f.decode, form=form, **of_model)
      masks = () if form == 'plain' else (of_all,)
      wanted[form] = (decode, state, params, live, *masks)
    for n in chunks:
      tokens, targets = abstract((1, n), np.int32), abstract((n,), np.int32)
      inputs = (state, params, number, tokens, number, flag, of_one)
      prefill = functools.partial(f.prefill, **of_model)
      score = functools.partial(f.score, **of_model)
      wanted[f'prefill_{n}'] = (prefill, *inputs)
      wanted[f'score_{n}'] = (score, *inputs, targets)
    if rows_of_bounded(config):
      forget = functools.partial(f.forget, config)
      wanted['forget'] = (forget, state, number)
    if settings is not None:
      see = functools.partial(f.see, model)
      picture = abstract((1, *settings.image_shape), np.float32)
      wanted['see'] = (see, state, params, of_picture, number, picture)
    self._wanted: dict[str, tuple[Callable, *tuple[Any, ...]]] = wanted
    self.names = tuple(wanted)

  def __missing__(self, name: str) -> jax.stages.Compiled:
    self.compile(name)
    return self[name]

  def compile(self, name: str) -> None:
    """Compiles one of `names` if it has not been."""
    if name in self:
      return
    function, *inputs = self._wanted[name]
    # The state is whoever's alone that runs them.
    donated = () if name in ('init', 'snapshot') else (0,)
    options = {}
    if self._backend == 'gpu':
      # A memory layer's output is needed blocks after its input is there.
      options['xla_gpu_command_buffer_scheduling_mode'] = 'CONCURRENT'

    def compiled():
      lowered = jax.jit(function, donate_argnums=donated).lower(*inputs)
      return lowered.compile(compiler_options=options)

    if self._devices is None:
      self[name] = compiled()
    else:
      with jax.set_mesh(self._devices):
        self[name] = compiled()

  def placed(self, x: np.ndarray) -> jax.Array:
    """What programs take, on the devices for good."""
    return jax.device_put(x, self._whole())

  def _whole(self):
    if self._devices is None:
      return None
    return jax.sharding.NamedSharding(self._devices, jax.P())

  def _abstract(self, shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=self._whole())

  def _evaluated(self, function, *args):
    if self._devices is None:
      return jax.eval_shape(function, *args)
    return mesh.abstract(function, *args, mesh=self._devices)


def _mesh_of(params):
  """The mesh that parameters lie on; None for one device."""
  sharding = jax.tree.leaves(params)[0].sharding
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return None
  return sharding.mesh


def _check(devices):
  with jax.set_mesh(devices):
    sizes = mesh.axis_sizes()
  require(
    sizes is not None and sizes['data'] * sizes['sparse'] == 1,
    f'the mesh must have the shape (1, 1, n) to serve, got {sizes}.',
  )
