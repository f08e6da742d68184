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

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from etils import epath

from jaxsparse import mesh
from jaxsparse.config import Config
from jaxsparse.config.errors import UserError, require
from jaxsparse.ops.memory.row_gradient import RowGradient
from jaxsparse.ops.tables import host_table
from jaxsparse.ops.tables.host_table import HostTable, Source
from jaxsparse.run import (
  disk,
  mapped_tables,
  row_file,
  row_store,
  stored,
  table_files,
  table_leaves,
)
from jaxsparse.run.row_file import RowFile
from jaxsparse.run.row_store import Change, Leaf, RowStore
from jaxsparse.run.row_undo import Before
from jaxsparse.training import first_rows
from jaxsparse.training.fetched_rows import (
  TakenRows,
  collected,
  finalized_rows,
  row_leaves,
  touched_leaf,
  update_rows,
)
from jaxsparse.training.first_rows import CHUNK_BYTES, DRAWN, Given
from jaxsparse.training.micro_batches import Batch, Metrics
from jaxsparse.training.optimizer import VALUES, make_row_optimizer
from jaxsparse.training.optimizers.finalizing import state_of, with_state
from jaxsparse.training.step import (
  TrainState,
  init_beside,
  step_beside,
)
from jaxsparse.training.table_step import (
  TableGradients,
  later_gradients,
  num_row_pieces,
  windows_of,
)

# Memory of mapped files that a run holds at most, after a step.
_MOST_BYTES = 2**28


class StoredTables:
  """The tables of one run and the state of their optimizer, by rows."""

  def __init__(self, config: Config, workdir: epath.PathLike):
    """Opens nothing yet.

    Raises:
      UserError: there is more than one process, or the workdir is remote.
    """
    require(
      jax.process_count() == 1,
      f'model.memory.table.store = {config.model.memory.table.store!r} needs '
      f'all devices in one process, got {jax.process_count()}: have the tables '
      'on the devices.',
    )
    used = jax.sharding.get_mesh()
    # Rows are changed by one device, whatever mesh reads them.
    self._alone = contextlib.nullcontext
    if used.size > 1:
      one = mesh.make_mesh(1, 1, 1, devices=used.devices.flat[:1].tolist())
      self._alone = functools.partial(jax.set_mesh, one)
    self._config, self._workdir = config, workdir
    self._folder = table_files.folder_of(workdir)
    self._store: RowStore | None = None
    self._is_finalized_at = -1
    self._taken = TakenRows()
    self._optimizer = make_row_optimizer(
      config.optimizer, config.train.num_steps
    )
    shapes = jax.eval_shape(lambda: first_rows.first_variables(config))
    self.shapes = {
      path: jax.ShapeDtypeStruct(x.shape, x.dtype)
      for path, x in table_leaves.split(shapes['params'])[1].items()
    }
    self._num_devices = max(1, used.size)
    self._num_pieces = num_row_pieces(config)
    # Where programs can't read the files, what stands for the tables and for
    # those that are finalized.
    reads = host_table.reads_host_memory() and used.size <= 1
    self._on_host, self._final_on_host = (
      {
        path: HostTable(Source(None), x.shape, np.dtype(x.dtype))
        for path, x in self.shapes.items()
        if not reads
      }
      for _ in range(2)
    )
    with self._alone():
      self._state = jax.eval_shape(self._optimizer.init, self.shapes)
    step = functools.partial(step_beside, config)
    self.program = jax.jit(step, donate_argnums=0)
    self._later = jax.jit(functools.partial(later_gradients, config))
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
      for path, x in self.shapes.items()
    }

  def init_parts(self) -> tuple[TrainState, dict]:
    """What is there before the first step, without tables; jit it."""
    return init_beside(self._config)

  def create(
    self, say: Callable[[str], None], given: Given = DRAWN, step: int = 0
  ) -> None:
    """Makes the tables as the resident ones begin, by slices.

    Args:
      say: gets a sentence about it.
      given: tables that are not drawn.
      step: of the checkpoint that has them.

    Raises:
      UserError: the disk is full or not writable, or a given table has another
        shape.
    """
    leaves = self._leaves()
    written = [
      path
      for path in self.shapes
      if path in given.rows
      or first_rows.draw_of(self._config, given, path) is not None
    ]
    num_bytes = sum(
      x.num_rows * x.row_bytes
      for name, x in leaves.items()
      if name.partition('.')[0] in written
    )
    disk.check_disk_space(self._workdir, num_bytes)
    self._store = row_store.create(self._folder, leaves)
    keys = {}
    if any(path not in given.rows for path in written):
      say('Drawing the first rows of the tables ...')
      keys = first_rows.table_keys(self._config, given)
    with self._alone():
      for path in written:
        self._fill(path, given, keys)
      self._store.seal(step)

  def create_from(
    self, workdir: epath.PathLike, step: int, say: Callable[[str], None]
  ) -> None:
    """`create` with the tables of a checkpoint that was given to the run."""
    self.create(say, Given(mapped_tables.readers(workdir, step)), step)

  def _fill(self, path: str, given: Given, keys: dict) -> None:
    table = self.shapes[path]
    if path in given.rows:
      rows = given.rows[path]()
      require(
        rows.shape == table.shape,
        f'{path} must be {list(table.shape)}, but is {list(rows.shape)} in the '
        'checkpoint that the run begins with.',
      )
      chunk = first_rows.reading(rows)
    else:
      draw = first_rows.draw_of(self._config, given, path)
      chunk = first_rows.drawing(draw, keys[path], table.shape[1])
    first_rows.fill(
      self._store, self._optimizer, path, table, chunk, _MOST_BYTES
    )

  def _leaves(self) -> dict[str, Leaf]:
    """Of the store, by their names."""
    leaves = {}
    for path, x in self.shapes.items():
      for name, leaf in [(path, x), *row_leaves(self._state, path)]:
        width = leaf.shape[1] if leaf.ndim > 1 else 0
        leaves[name] = Leaf(leaf.shape[0], width, str(leaf.dtype))
    return leaves

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
    if gradients is not None and is_finite:
      state = self._apply(state, step, gradients)
    if self._config.model.memory.table.store == 'file':
      self._store.limit_memory(_MOST_BYTES)
    return state, metrics

  def _apply(
    self, state: TrainState, step: jax.Array, gradients: TableGradients
  ) -> TrainState:
    before = state_of(state.opt_state, VALUES)
    count = optax.tree_utils.tree_get(before, 'count')
    scalars, structure = jax.tree.flatten(before)
    shardings = [x.sharding for x in scalars]
    if self._num_devices > 1:
      scalars, count, step = jax.tree.map(np.asarray, (scalars, count, step))
    for window in windows_of(gradients, self._later):
      with self._alone():
        scalars = self._change(window, scalars, count, step)
    if self._num_devices > 1:
      scalars = jax.device_put(jax.tree.map(np.asarray, scalars), shardings)
    after = jax.tree.unflatten(structure, scalars)
    opt_state = with_state(state.opt_state, VALUES, after)
    return dataclasses.replace(state, opt_state=opt_state)

  def _change(
    self,
    gradients: dict[str, RowGradient],
    scalars: list,
    count: jax.Array,
    step: jax.Array,
  ) -> list:
    """Changes rows; returns the scalars of their optimizer's state."""
    ids, before, old, sizes = {}, [], {}, []
    for path, gradient in gradients.items():
      num_rows = self.shapes[path].shape[0]
      ids[path], size, gradients[path] = collected(
        gradient, num_rows, self._num_pieces
      )
      old[path] = self._taken(self._store, path, ids[path], size)
      known = {n: x[: len(ids[path])] for n, x in old[path].items()}
      before.append(Before(ids[path], known))
      sizes.append(size)
    new, scalars = self._update(
      tuple(sizes), gradients, self._given(old), scalars, count, step
    )
    # The program runs meanwhile.
    self._store.note(before)
    changes = []
    for path, of in new.items():
      num_rows = len(ids[path])
      rows = {n: np.asarray(x)[:num_rows] for n, x in of.items()}
      changes.append(Change(ids[path], rows))
    self._store.write(changes)
    return scalars

  def _given(self, rows: Any) -> Any:
    """Arrays of numpy as programs take them; on a CPU without a copy."""
    if not host_table.reads_host_memory():
      return rows
    return jax.tree.map(
      lambda x: table_files.on_own_mesh(row_file.shown(x)), rows
    )

  @property
  def files(self) -> dict[str, RowFile]:
    """Of tables and of their optimizer's state."""
    return self._store.files

  def arrays(self) -> dict[str, jax.Array | HostTable]:
    """The tables as they are, without a copy, on the mesh in use."""
    return self._shown({p: self._store.files[p] for p in self.shapes})

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
    files = {p: self._store.files[p] for p in self.shapes}
    is_done = int(state.step) == self._is_finalized_at
    if not self._optimizer.is_final and not is_done:
      for path, x in self.shapes.items():
        file = self._store.files[path]
        copy = RowFile(file.path, x.shape, str(x.dtype))
        for ids, rows in self._done(path, state):
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
    for path in self.shapes:
      for ids, rows in self._done(path, state):
        old = self._taken(self._store, path, ids, len(ids))
        with self._alone():
          self._store.note([Before(ids, old)])
        self._store.write([Change(ids, rows)])
        self._store.limit_memory(_MOST_BYTES)
    self._is_finalized_at = step
    return state

  def _done(self, path: str, state: TrainState):
    """Rows ever touched, some at a time, with all their steps done."""
    scalars = jax.tree.leaves(state_of(state.opt_state, VALUES))
    if self._num_devices > 1:
      scalars = jax.tree.map(np.asarray, scalars)
    size = max(1, CHUNK_BYTES // (4 * self.shapes[path].shape[1]))

    finalize = jax.jit(
      functools.partial(finalized_rows, self._optimizer, self._state, path)
    )
    for found in self._store.touched(touched_leaf(self._state, path)):
      for first in range(0, len(found), size):
        ids = found[first : first + size]
        # Few lengths, as each is compiled for.
        room = min(size, 1 << max(len(ids) - 1, 1).bit_length())
        with self._alone():
          new = finalize(self._taken(self._store, path, ids, room), scalars)
        yield ids, {n: np.asarray(x)[: len(ids)] for n, x in new.items()}

  def seal(self, step: int) -> dict[str, str]:
    """Makes the tables those of a checkpoint that is about to be saved.

    Returns:
      What its record is to say.
    """
    kept = stored.steps_with_tables(self._workdir)
    self._store.forget_before(min([*kept, step]))
    with self._alone():
      return {table_leaves.ON_FILE: self._store.seal(step)}

  def close(self) -> None:
    if self._store is not None:
      self._store.close()


def of_run(config: Config, workdir: epath.PathLike) -> StoredTables | None:
  """The tables of a run that has them on file; None for others."""
  is_stored = config.model.has_tables_on_file
  return StoredTables(config, workdir) if is_stored else None
