# SPDX-License-Identifier: Apache-2.0
"""Training with tables in files: rows come to the step and go back.

The step reads the mapped tables and returns their gradients row by row. The
rows that it touched and those of the optimizer's state are then taken from the
files, changed by a program of their own and written back in the order of their
numbers. It is the step of `table_step` bit for bit; memory and time follow the
rows touched.

A checkpoint holds everything else. The store is sealed before it is saved, so
that whatever checkpoint is the newest after a kill has its tables.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxsparse import mesh
from jaxsparse.config import Config
from jaxsparse.config.errors import UserError, require
from jaxsparse.nn.memory.init import table_parameters
from jaxsparse.nn.memory.tables import KEYS
from jaxsparse.nn.transformer import Transformer
from jaxsparse.ops.memory.row_gradient import RowGradient
from jaxsparse.ops.memory.sliced_draw import draw_rows, place_of
from jaxsparse.ops.tables import host_table
from jaxsparse.ops.tables.host_table import HostTable, Source
from jaxsparse.run import (
  disk,
  row_file,
  row_store,
  stored,
  table_files,
  table_leaves,
)
from jaxsparse.run.row_file import RowFile
from jaxsparse.run.row_store import Change, Leaf, RowStore
from jaxsparse.run.row_undo import Before
from jaxsparse.training.fetched_rows import (
  filled,
  hash_changes,
  rounded_up,
  row_leaves,
  update_rows,
)
from jaxsparse.training.micro_batches import Batch, Metrics
from jaxsparse.training.optimizer import VALUES, make_row_optimizer
from jaxsparse.training.optimizers.finalizing import state_of, with_state
from jaxsparse.training.step import (
  TrainState,
  init_beside,
  step_beside,
)

# Memory of mapped files that a run holds at most, after a step.
_MOST_BYTES = 2**28

# Of rows that are drawn or finalized at once.
_CHUNK_BYTES = 2**24


class StoredTables:
  """The tables of one run and the state of their optimizer, by rows."""

  def __init__(self, config: Config, workdir: epath.PathLike):
    """Opens nothing yet.

    Raises:
      UserError: there is more than one device, or the workdir is remote.
    """
    where = f'model.memory.table.store = {config.model.memory.table.store!r}'
    num_devices = max(1, jax.sharding.get_mesh().size)
    require(
      num_devices == 1 and jax.process_count() == 1,
      f'{where} needs a mesh of one device, got {num_devices}: set mesh.data '
      'to 1, or have the tables on the devices.',
    )
    self._config, self._workdir = config, workdir
    self._folder = table_files.folder_of(workdir)
    self._store: RowStore | None = None
    self._is_finalized_at = -1
    # For rows of a leaf, as many as are computed with at once.
    self._buffers: dict[tuple[str, int], np.ndarray] = {}
    self._optimizer = make_row_optimizer(
      config.optimizer, config.train.num_steps
    )
    shapes = jax.eval_shape(functools.partial(_first_variables, config))
    self._tables = table_leaves.split(shapes['params'])[1]
    # Where programs can't read the files, what stands for the tables and for
    # those that are finalized.
    self._on_host, self._final_on_host = (
      {}
      if host_table.reads_host_memory()
      else {
        path: HostTable(Source(None), x.shape, np.dtype(x.dtype))
        for path, x in self._tables.items()
      }
      for _ in range(2)
    )
    self._state = jax.eval_shape(self._optimizer.init, self._tables)
    self.program = jax.jit(
      functools.partial(step_beside, config), donate_argnums=0
    )
    self._update = jax.jit(
      functools.partial(update_rows, config, self._optimizer, self._state),
      static_argnums=0,
    )

  @property
  def abstract(self) -> dict[str, jax.ShapeDtypeStruct | HostTable]:
    """The tables as the step takes them."""
    if self._on_host:
      return self._on_host
    return {
      path: x.update(sharding=table_files.on_mesh())
      for path, x in self._tables.items()
    }

  def init_parts(self) -> tuple[TrainState, dict]:
    """What is there before the first step, without tables; jit it."""
    return init_beside(self._config)

  def create(self, say: Callable[[str], None]) -> None:
    """Makes the tables as the resident ones begin, by slices.

    Raises:
      UserError: the disk is full or not writable.
    """
    leaves = self._leaves()
    drawn = {p: d for p in self._tables if (d := self._draw_of(p)) is not None}
    of_drawn = [x for n, x in leaves.items() if n.partition('.')[0] in drawn]
    num_bytes = sum(x.num_rows * x.row_bytes for x in of_drawn)
    disk.check_disk_space(self._workdir, num_bytes)
    self._store = row_store.create(self._folder, leaves)
    if drawn:
      say('Drawing the first rows of the tables ...')
      keys = jax.jit(
        lambda: table_leaves.split(_first_variables(self._config)[KEYS])[1]
      )()
    for path, draw in drawn.items():
      self._fill(path, draw, keys[path])
    self._store.seal(0)

  def _leaves(self) -> dict[str, Leaf]:
    """Of the store, by their names."""
    leaves = {}
    for path, x in self._tables.items():
      for name, leaf in [(path, x), *row_leaves(self._state, path)]:
        width = leaf.shape[1] if leaf.ndim > 1 else 0
        leaves[name] = Leaf(leaf.shape[0], width, str(leaf.dtype))
    return leaves

  def _draw_of(self, path: str) -> Callable | None:
    """What draws the rows of a table; None if they are zeros."""
    model, name = self._config.model, path.rpartition('/')[2]
    if name == 'value_table' and model.memory.table.init == 'zeros':
      return None
    declared = table_parameters(
      model.memory, model.model_dim, model.num_layers, 'columns'
    )
    return declared[name][0]

  def _fill(self, path: str, draw: Callable, key: jax.Array) -> None:
    num_rows, width = self._tables[path].shape
    size = max(1, min(num_rows, _CHUNK_BYTES // (4 * width)))

    @jax.jit
    def chunk(place):
      rows = draw_rows(draw, key, place, (size, width))
      state = self._optimizer.init({path: rows})
      return {path: rows} | dict(row_leaves(state, path))

    for first in range(0, num_rows, size):
      for name, rows in chunk(place_of(first * width)).items():
        rows = np.asarray(rows)[: num_rows - first]
        if rows.any():
          self._store.fill(name, first, rows)
      self._store.limit_memory(_MOST_BYTES)

  def open(self, step: int, record: dict) -> None:
    """Opens the tables as they were at a checkpoint.

    Args:
      step: of the checkpoint.
      record: of it, with what `seal` returned.

    Raises:
      UserError: they are not there, damaged, or of another run.
    """
    digest = record.get(table_leaves.ON_FILE)
    self._store = table_files.open_at(
      self._workdir, step, digest, is_private=False
    )
    if self._store.leaves != self._leaves():
      raise UserError(
        f'the tables in {str(self._folder)!r} are of another model or '
        'optimizer: give another --workdir.'
      )
    if self._config.model.memory.table.store == 'host':
      for file in self._store.files.values():
        file.read_ahead()

  def train_step(
    self, state: TrainState, batch: Batch, frozen: dict | None = None
  ) -> tuple[TrainState, Metrics]:
    """One optimizer step; returns when the rows are in their places."""
    step = state.step + 0  # The state is donated.
    state, metrics, gradients = self.program(
      state, self.arrays(), batch, frozen or {}
    )
    self._is_finalized_at = -1
    is_finite = state.loss_scale is None or np.isfinite(metrics['grad_norm'])
    if gradients and is_finite:
      state = self._apply(state, step, gradients)
    if self._config.model.memory.table.store == 'file':
      self._store.limit_memory(_MOST_BYTES)
    return state, metrics

  def _apply(
    self, state: TrainState, step: jax.Array, gradients: dict[str, RowGradient]
  ) -> TrainState:
    scalars = state_of(state.opt_state, VALUES)
    ids, before, old = {}, [], {}
    for path, gradient in gradients.items():
      slot = np.asarray(gradient.slot)
      num_rows = self._tables[path].shape[0]
      ids[path] = slot[: np.searchsorted(slot, num_rows)].astype(np.int64)
      old[path] = self._take(path, ids[path], rounded_up(slot, ids[path]))
      known = {n: x[: len(ids[path])] for n, x in old[path].items()}
      before.append(Before(ids[path], known))
    sizes = tuple(len(old[path][path]) for path in gradients)
    new, changes, scalars = self._update(
      sizes, gradients, self._given(old), jax.tree.leaves(scalars), step
    )
    # The program runs meanwhile.
    self._store.note(before)

    def own(found, path):
      num_rows = len(ids[path])
      return {n: np.asarray(x)[:num_rows] for n, x in found[path].items()}

    self._store.write(
      [Change(ids[p], own(new, p), own(changes, p)) for p in gradients]
    )
    return self._with_scalars(state, scalars)

  def _take(self, path: str, ids: np.ndarray, size: int) -> dict:
    """Rows of a table and of its state, with room for more rows after them.

    The arrays are the same at the next call of as many rows.
    """
    taken = {}
    for name, leaf in self._store.leaves.items():
      if name.partition('.')[0] != path:
        continue
      rows = self._store.files[name].rows
      if (name, size) not in self._buffers:
        shape = (size, *leaf.shape[1:])
        self._buffers[name, size] = np.zeros(shape, rows.dtype)
      taken[name] = self._buffers[name, size]
      np.take(rows, ids, axis=0, out=taken[name][: len(ids)], mode='clip')
    return taken

  def _given(self, rows: Any) -> Any:
    """Arrays of numpy as programs take them; on a CPU without a copy."""
    if not host_table.reads_host_memory():
      return rows
    return jax.tree.map(
      lambda x: table_files.on_own_mesh(row_file.shown(x)), rows
    )

  def _with_scalars(self, state: TrainState, scalars: list) -> TrainState:
    before = state_of(state.opt_state, VALUES)
    after = jax.tree.unflatten(jax.tree.structure(before), scalars)
    opt_state = with_state(state.opt_state, VALUES, after)
    return dataclasses.replace(state, opt_state=opt_state)

  @property
  def files(self) -> dict[str, RowFile]:
    """Of tables and of their optimizer's state."""
    return self._store.files

  def arrays(self) -> dict[str, jax.Array | HostTable]:
    """The tables as they are, without a copy, on the mesh in use."""
    return self._shown({p: self._store.files[p] for p in self._tables})

  def _shown(
    self, files: dict[str, RowFile], is_final: bool = False
  ) -> dict[str, jax.Array | HostTable]:
    on_host = self._final_on_host if is_final else self._on_host
    for path, table in on_host.items():
      # What is compiled for the table knows its source.
      table.source.rows = files[path].rows
    return on_host or table_files.placed(files)

  def finalized(self, state: TrainState) -> TrainState:
    """The state with the tables, all steps done, for validation.

    The files stay as they are: rows with steps left to do are done in copies of
    their pages, as long as the result is used.
    """
    files = {p: self._store.files[p] for p in self._tables}
    is_done = int(state.step) == self._is_finalized_at
    if not self._optimizer.is_final and not is_done:
      for path, x in self._tables.items():
        file = self._store.files[path]
        copy = RowFile(file.path, x.shape, str(x.dtype))
        for ids, rows, _ in self._done(path, state):
          copy.rows[ids] = rows[path]
        files[path] = copy
        copy.close()
    shown = self._shown(files, is_final=True)
    params = table_leaves.joined(state.params, shown)
    return dataclasses.replace(state, params=params)

  def finish(self, state: TrainState) -> TrainState:
    """Does in the files what the optimizer has left for later."""
    step = int(state.step)
    if self._optimizer.is_final or step == self._is_finalized_at:
      return state
    for path in self._tables:
      for ids, rows, changes in self._done(path, state):
        old = self._take(path, ids, len(ids))
        self._store.note([Before(ids, old)])
        self._store.write([Change(ids, rows, changes)])
        self._store.limit_memory(_MOST_BYTES)
    self._is_finalized_at = step
    return state

  def _done(self, path: str, state: TrainState):
    """Rows ever touched, some at a time, with all their steps done."""
    scalars = jax.tree.leaves(state_of(state.opt_state, VALUES))
    size = max(1, _CHUNK_BYTES // (4 * self._tables[path].shape[1]))

    @jax.jit
    def finalize(old, number, scalars):
      of_state = filled(self._state, old, scalars)
      tables, of_state = self._optimizer.finalize({path: old[path]}, of_state)
      new = {path: tables[path]} | dict(row_leaves(of_state, path))
      return new, hash_changes(new, old, number)

    touched = next(
      name
      for name, _ in row_leaves(self._state, path)
      if name.endswith(_TOUCHED)
    )
    for found in self._store.touched(touched):
      for first in range(0, len(found), size):
        ids = found[first : first + size]
        # Few lengths, as each is compiled for.
        room = min(size, 1 << max(len(ids) - 1, 1).bit_length())
        number = np.zeros(room, np.uint32)
        number[: len(ids)] = ids
        new, changes = finalize(self._take(path, ids, room), number, scalars)
        yield (
          ids,
          {n: np.asarray(x)[: len(ids)] for n, x in new.items()},
          {n: np.asarray(x)[: len(ids)] for n, x in changes.items()},
        )

  def seal(self, step: int) -> dict[str, str]:
    """Makes the tables those of a checkpoint that is about to be saved.

    Returns:
      What its record is to say.
    """
    kept = stored.steps_in(self._workdir)
    self._store.forget_before(min([*kept, step]))
    return {table_leaves.ON_FILE: self._store.seal(step)}

  def close(self) -> None:
    if self._store is not None:
      self._store.close()


def of_run(config: Config, workdir: epath.PathLike) -> StoredTables | None:
  """The tables of a run that has them on file; None for others."""
  memory = config.model.memory
  is_stored = memory is not None and memory.table.store != 'device'
  return StoredTables(config, workdir) if is_stored else None


# Leaf of the state of row Adam, which alone leaves steps for later.
_TOUCHED = '.touched'


def _first_variables(config: Config) -> Any:
  """What the model's `init` gives, and the keys that tables are drawn with."""
  tokens = jnp.zeros((mesh.num_token_shards(), 1), jnp.int32)
  tokens = mesh.reshard(tokens, mesh.act('BT'))
  return Transformer(config.model).init(
    jax.random.key(config.train.seed),
    tokens,
    tokens,
    tokens,
    mutable=['params', KEYS],
  )
