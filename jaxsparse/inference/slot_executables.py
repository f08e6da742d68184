# SPDX-License-Identifier: Apache-2.0
"""The executables of slots, by name; each is made at most once in a process."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxsparse import mesh
from jaxsparse.config import ModelConfig, MultiModalConfig
from jaxsparse.config.errors import require
from jaxsparse.inference import slot_functions, slot_sampling
from jaxsparse.inference.jobs import JobSampling
from jaxsparse.inference.picture_prefix import PicturePrefix
from jaxsparse.inference.slots import rows_of_bounded

# Kinds of slots whose executables are kept for who needs the same ones.
_MOST_KINDS = 4


def of(
  config: ModelConfig,
  params: dict,
  num_slots: int,
  num_rows: int,
  chunks: tuple[int, ...],
  stop_ids: tuple[int, ...],
  pictures: PicturePrefix | None = None,
) -> 'Executables':
  """Those of such slots, whatever the parameters' values are.

  Args:
    config: of the model.
    params: on one device, or on a mesh of shape (1, 1, n).
    num_slots: sequences at once.
    num_rows: rows of each, a multiple of the longest chunk.
    chunks: tokens that are read at once, falling.
    stop_ids: tokens that end an answer.
    pictures: that may stand before texts; their parameters' values are of no
      matter.

  Raises:
    UserError: the mesh splits sequences.
  """
  devices = _mesh_of(params)

  def abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    sharding = None if devices is None else x.sharding
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  both = params, pictures.params if pictures else {}
  leaves, structure = jax.tree.flatten(jax.tree.map(abstract, both))
  return _kept(
    config, pictures and pictures.settings, devices, tuple(leaves), structure,
    num_slots, num_rows, chunks, stop_ids, jax.default_backend(),
  )  # fmt: skip


@functools.lru_cache(_MOST_KINDS)
def _kept(config, settings, devices, leaves, structure, *sizes):
  params, of_picture = jax.tree.unflatten(structure, leaves)
  found = Executables(config, devices, params, *sizes)
  if settings is not None:
    found.add_pictures(config, settings, params, of_picture)
  return found


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
    config: ModelConfig,
    devices: jax.sharding.Mesh | None,
    params: dict,
    num_slots: int,
    num_rows: int,
    chunks: tuple[int, ...],
    stop_ids: tuple[int, ...],
    backend: str,
  ):
    """As `of`; `params` are abstract, on the mesh `devices` if it is one."""
    super().__init__()
    self._devices, self._backend = devices, backend
    if devices is not None:
      _check(devices)
    abstract, f = self._abstract, slot_functions
    size = words(config.vocab_size)
    number, flag = abstract((), np.int32), abstract((), np.bool_)
    live = abstract((num_slots,), np.bool_)
    of_all, of_one = (abstract((n, size), np.uint32) for n in (num_slots, 1))
    init = functools.partial(f.init, config, num_slots, num_rows)
    snapshot = functools.partial(f.snapshot, config, chunks[0])
    insert = functools.partial(f.insert, config, chunks[0])
    state = self._evaluated(init)
    taken = self._evaluated(snapshot, state, number, number)
    fields = jax.tree.map(
      lambda x: abstract(x.shape, x.dtype), slot_sampling.of_job(JobSampling())
    )
    model = dict(config=config, stop_ids=stop_ids)
    wanted = dict(
      init=(init,),
      start=(f.start, state, number, fields, number),
      snapshot=(snapshot, state, number, number),
      insert=(insert, state, number, number, taken),
    )
    for form in ('plain', 'sorted', 'logprobs'):
      decode = functools.partial(f.decode, form=form, **model)
      masks = () if form == 'plain' else (of_all,)
      wanted[form] = (decode, state, params, live, *masks)
    for n in chunks:
      tokens, targets = abstract((1, n), np.int32), abstract((n,), np.int32)
      inputs = (state, params, number, tokens, number, flag, of_one)
      prefill = functools.partial(f.prefill, **model)
      score = functools.partial(f.score, **model)
      wanted[f'prefill_{n}'] = (prefill, *inputs)
      wanted[f'score_{n}'] = (score, *inputs, targets)
    if rows_of_bounded(config):
      forget = functools.partial(f.forget, config)
      wanted['forget'] = (forget, state, number)
    self._wanted: dict[str, tuple[Callable, *tuple[Any, ...]]] = wanted
    self.names = tuple(wanted)

  def add_pictures(
    self,
    config: ModelConfig,
    settings: MultiModalConfig,
    params: dict,
    of_picture: dict,
  ) -> None:
    """Also the one that reads a picture; both kinds of parameters abstract."""
    see = functools.partial(
      slot_functions.see, config=config, settings=settings
    )
    number = self._abstract((), np.int32)
    picture = self._abstract((1, *settings.image_shape), np.float32)
    state = self._wanted['start'][1]
    self._wanted['see'] = (see, state, params, of_picture, number, picture)
    self.names = tuple(self._wanted)

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
