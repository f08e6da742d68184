# SPDX-License-Identifier: Apache-2.0
"""A workdir's model as an engine: what is loaded, how large, and how far."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

from jaxsparse import mesh
from jaxsparse.analysis import free_memory
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import UserError, require
from jaxsparse.data.tokenizer import load_from_workdir
from jaxsparse.inference import row_cache, served_adapters, sight, weights
from jaxsparse.inference.batch_rows import padded
from jaxsparse.inference.capacity import slots_that_fit
from jaxsparse.inference.engine import Engine
from jaxsparse.inference.fold import fold_for_decode
from jaxsparse.inference.long_input import with_bounded_history
from jaxsparse.inference.quantize import Quantization
from jaxsparse.inference.sight import require_captions
from jaxsparse.inference.slot_model import SlotModel
from jaxsparse.inference.slot_programs import Programs
from jaxsparse.nn.transformer import init_cache
from jaxsparse.run import (
  adapter_files,
  compiled_programs,
  run_config,
  stored,
  table_leaves,
  trained,
)
from jaxsparse.serving.metrics import Metrics

# For a step that runs.
_RELOAD_SECONDS = 60

# More would rather wait for each other on most machines.
_MOST_SLOTS = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What of a model is served, and how much at once; None for the default."""

  # A checkpoint, or 'best'.
  step: int | Literal['best'] | None = None
  slots: int | None = None
  # Tokens of a sequence.
  length: int | None = None
  chunk: int = 256
  history_blocks: int | None = None
  # How keys and values are kept, one of `KV_CACHES`.
  kv: str | None = None
  max_queue: int | None = None
  max_queue_tokens: int | None = None
  prefix_bytes: int = 0
  memory_fraction: float = 0.8
  devices: int = 1
  # Where the tables lie; empty: as the run has them.
  tables: str = ''
  # Of tables that the device fetches.
  cached_rows: row_cache.Size | None = None
  quantization: Quantization | None = None
  # Folders of adapters by their names.
  adapters: Mapping[str, str] = dataclasses.field(default_factory=dict)
  # Take those of another base, too.
  is_forced: bool = False


class Model:
  """Loaded in the engine's thread, once that is started."""

  def __init__(self, workdir: str, sizes: Sizes, say: Callable[[str], Any]):
    """Reads what is small.

    Args:
      workdir: of a training run.
      sizes: what is wanted.
      say: gets warnings.

    Raises:
      UserError: the workdir is none, or can't serve so.
    """
    self._workdir, self._sizes, self._say = workdir, sizes, say
    config = run_config.read(workdir, say, may_see=True)
    self.pictures = config.multimodal and require_captions(config)
    if self.pictures is not None:
      _check_of_pictures(sizes)
    compiled_programs.keep(say=say)
    self.tokenizer = load_from_workdir(workdir, config.model.vocab_size)
    self.config = config.model.with_vocabulary(self.tokenizer.vocab_size)
    if sizes.kv:
      self.config = dataclasses.replace(self.config, kv_cache=sizes.kv)
    self.vocab_size = self.config.vocab_size
    seq_len = config.data.seq_len
    self.length = sizes.length or seq_len
    if self.length > seq_len and sizes.history_blocks is None:
      say(
        f'warning: --max-len={self.length} is more than the {seq_len} tokens '
        'of training; what lies beyond may be poor.'
      )
    require(
      jax.process_count() == 1,
      f'model-server runs in one process, got {jax.process_count()}: start one '
      'on each host behind a proxy.',
    )
    require(
      not (sizes.adapters and sizes.devices > 1),
      f'--devices must be 1 with --adapters, got {sizes.devices}: start a '
      'server for each adapter.',
    )
    for folder in sizes.adapters.values():
      # Before anything is loaded.
      adapter_files.read_meta(folder)
    self._shapes: dict = {}
    self.step = 0
    self.metrics = Metrics()
    self.on_ready: Callable[[str], Any] = lambda line: None
    self.engine = Engine(
      self._build,
      self.tokenizer,
      max_queue=sizes.max_queue,
      max_queue_tokens=sizes.max_queue_tokens,
      prefix_bytes=sizes.prefix_bytes,
      observe=self.metrics.observe,
    )

  def _build(self, progress: Callable[[str], None]) -> Programs:
    """Loads and compiles, in the engine's thread."""
    sizes = self._sizes
    progress('reading the checkpoint')
    devices = None
    if sizes.devices > 1:
      devices = mesh.make_mesh(1, 1, sizes.devices)
    step, found = trained.step_of(self._workdir, sizes.step), None
    if self.pictures is None:
      self.step, params = weights.load(
        self._workdir,
        self.config,
        step,
        devices,
        self._say,
        sizes.quantization,
        sizes.tables,
        # Adapters are of the model's own matrices.
        is_folded=not sizes.adapters,
      )
    else:
      self.step, params, found = sight.load(
        self._workdir, self.pictures, self.config, step, self._say
      )
    params = row_cache.begun(params, sizes.cached_rows, '--row-cache')
    of_sight = _bytes(found.params) if found else 0
    held_bytes = _bytes(params) + of_sight
    if self._tables() == 'file':
      # Mapped, they take no memory that they don't give back.
      rest, _ = table_leaves.split(params)
      held_bytes = _bytes(rest) + row_cache.num_bytes(params)
    num_slots = self._num_slots(held_bytes)
    places = None
    if sizes.adapters:
      self._shapes = served_adapters.shapes_of(params)
      given = [self._read_adapter(name) for name in sizes.adapters]
      params, places = served_adapters.with_places(
        params, given, self.config.dtype
      )
      params = fold_for_decode(self.config, params)
    programs = Programs.compile(
      self.config,
      params,
      num_slots,
      self.length,
      chunks=(sizes.chunk, max(1, sizes.chunk // 4), 16),
      history_blocks=sizes.history_blocks,
      progress=lambda done, total, name: progress(
        f'compiling {done + 1} of {total} ({name})'
      ),
      stop_ids=self.tokenizer.stop_ids,
      places=places,
      sight=found,
    )
    words = free_memory.words
    is_endless = sizes.history_blocks is not None
    length = 'any number of' if is_endless else f'{self.length:,}'
    self.on_ready(
      f'step {self.step}, {num_slots} slots of {length} tokens, weights of '
      f'{words(_bytes(params) + of_sight)}, caches of '
      f'{words(programs.state_bytes)}, {programs.num_compiled} programs'
    )
    return programs

  def reload(self, name: str) -> None:
    """Reads an adapter's folder again, for texts that begin from now on.

    Raises:
      UserError: it can't be read, or does not fit into a place.
      NoPlace: texts are still being written by the one before the present one.
    """
    adapter = self._read_adapter(name)
    self.engine.put_adapter(adapter).result(_RELOAD_SECONDS)

  def _read_adapter(self, name: str) -> served_adapters.Adapter:
    sizes = self._sizes
    base = stored.params_fingerprint(self._workdir, self.step)
    folder = sizes.adapters[name]
    return served_adapters.read(
      name, folder, self._shapes, base, sizes.is_forced
    )

  def _tables(self) -> str:
    if self._sizes.tables or self.config.memory is None:
      return self._sizes.tables
    checkpoints = stored.folder_of(self._workdir)
    digest = stored.tables_on_file(checkpoints, self.step)
    return 'device' if digest is None else 'file'

  def _num_slots(self, weight_bytes: int) -> int:
    """As many as asked for, or as many as fit.

    Args:
      weight_bytes: of the parameters, which are in memory by now.
    """
    sizes = self._sizes
    free = free_memory.of_device(jax.devices()[0])
    if free is None:
      return sizes.slots or _MOST_SLOTS
    weight_bytes //= sizes.devices
    model = SlotModel(self.config, self.pictures)
    length = self.length + model.rows_before
    one = slot_bytes(self.config, length, sizes.history_blocks)
    # What programs hold as they run is seen only when they are compiled.
    most = slots_that_fit(
      free + weight_bytes,
      sizes.memory_fraction,
      weight_bytes,
      _temporary_bytes(self.config, sizes.chunk, length),
      sizes.prefix_bytes,
      -(-one // sizes.devices),
      least=padded(1),
    )
    if (sizes.slots or 1) > most:
      raise UserError(
        f'--slots={sizes.slots} is more than the {most} that fit into '
        'memory: lower it, --max-len or --prefix-mib.'
      )
    return sizes.slots or min(most, _MOST_SLOTS)


def _check_of_pictures(sizes: Sizes) -> None:
  """Refuses what is of models of text alone.

  Raises:
    UserError: something of it is wanted.
  """
  blocks = sizes.history_blocks
  for flag, value in (
    ('--adapters', list(sizes.adapters)),
    ('--quantize', sizes.quantization),
    ('--tables', sizes.tables),
    ('--row-cache', sizes.cached_rows),
    ('--history-blocks', '' if blocks is None else str(blocks)),
    ('--devices', sizes.devices - 1 and sizes.devices),
  ):
    require(
      not value,
      f'{flag} is of models of text alone, and this one sees pictures: leave '
      'it out.',
    )


def slot_bytes(
  config: ModelConfig, length: int, history_blocks: int | None = None
) -> int:
  """Bytes of one slot's cache.

  Args:
    config: of the model.
    length: tokens.
    history_blocks: of a history of bounded size; None keeps all.
  """
  if history_blocks is not None:
    config = with_bounded_history(config, length, history_blocks or None)
  return _bytes(jax.eval_shape(lambda: init_cache(config, 1, length)))


def _temporary_bytes(config: ModelConfig, chunk: int, length: int) -> int:
  """Of a chunk's scores and its widest activations, several times over."""
  scores = 4 * config.num_heads * chunk * length
  return 4 * (scores + 4 * chunk * 8 * config.model_dim)


def _bytes(tree: Any) -> int:
  return sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )
