# SPDX-License-Identifier: Apache-2.0
"""tables: the same table in memory and in a mapped file, in one process.

A decode step at each batch, and a training step of a row optimizer, of a small
model whose table lies in memory ('device') or in files ('file'). Both decode
with one compiled program and the same numbers; training takes the same batch,
so that both change the same rows. 'device, again' is another copy in memory:
how far it is from the first is what the machine's other work makes of equals.
Times are those of the fastest call of each, as that work only adds to them;
medians stand beside them in the records. Warm means that the system's cache has
the rows. Cold ones come from the disk: before each call the process gives its
pages back and the system is asked to forget the file, which it may not do.

`rows` reads as many rows as a table allows, drawn evenly: from a table of 320
KB, which fits into a core's cache, from one in memory and from the file. `open`
is the time until the file's table can be read; `convert` that of writing it.

--picture=FILE draws the times beside those in memory.
"""

import argparse
import contextlib
import dataclasses
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.analysis.plots import COLOURS, new_figure
from jaxsparse.config import Config
from jaxsparse.config.errors import require
from jaxsparse.experiments.bench import measuring, train_step
from jaxsparse.experiments.bench.measuring import Contender
from jaxsparse.nn.transformer import Transformer, init_cache
from jaxsparse.run import row_store, table_leaves
from jaxsparse.run.row_file import RowFile
from jaxsparse.training import step as step_lib
from jaxsparse.training import stored_tables

OPTIONS = dict(
  optimizer='lazy_row_adam',
  # Sub-keys a side: 262,144 rows.
  num_keys=512,
  # Which, with commas between.
  tasks='rows,decode,train',
  # Of a training step, in sequences of seq_len.
  tokens=1024,
  seq_len=64,
  # Sequences that decode at once, with commas between.
  batches='1,16',
  # Rows of one reading.
  reads=8192,
  rounds=15,
  # On the disk to be measured; a temporary one by default.
  folder='',
  picture='',
)


def measure(options: argparse.Namespace) -> Iterator[dict]:
  """Records of all tasks; ratios are to what lies in memory."""
  require(
    jax.default_backend() == 'cpu',
    f'bench tables needs a CPU, got a {jax.default_backend()}.',
  )
  records = []
  for record in _measured(options):
    records.append(record)
    yield record
  if options.picture:
    draw(records, options.picture)
    print(f'Picture: {options.picture}')


def _measured(options: argparse.Namespace) -> Iterator[dict]:
  config = train_step.make_config(_recipe(options), options.optimizer, 1)
  with contextlib.ExitStack() as stack:
    folder = options.folder or stack.enter_context(
      tempfile.TemporaryDirectory()
    )
    state = jax.jit(lambda: step_lib.init_state(config))()
    yield from _opening(state.params, pathlib.Path(folder))
    mapped, files = _mapped(state.params, pathlib.Path(folder))
    tasks = options.tasks.split(',')
    if 'rows' in tasks:
      yield from _rows(options, state.params, mapped, files)
    batches = options.batches.split(',') if 'decode' in tasks else ()
    for batch_size in map(int, batches):
      yield from _decoding(options, config, state.params, mapped, files,
                           batch_size)  # fmt: skip
    if 'train' in tasks:
      yield from _training(options, config, state, pathlib.Path(folder) / 'run')


def _recipe(options: argparse.Namespace) -> argparse.Namespace:
  return argparse.Namespace(
    config='',
    num_keys=options.num_keys,
    seq_len=options.seq_len,
    tokens=options.tokens,
  )


def _opening(params: dict, folder: pathlib.Path) -> Iterator[dict]:
  """Writes the tables to files, and opens them."""
  _, tables = table_leaves.split(params)
  leaves = {
    n: row_store.Leaf(*x.shape, str(x.dtype)) for n, x in tables.items()
  }
  start = time.perf_counter()
  store = row_store.create(folder / 'mapped', leaves)
  for name, x in tables.items():
    store.fill(name, 0, np.asarray(x))
  store.seal(0)
  num_bytes = sum(x.nbytes for x in tables.values())
  yield _record('convert', 'file', time.perf_counter() - start, num_bytes)
  store.close()
  start = time.perf_counter()
  opened = row_store.open_at(folder / 'mapped', 0)
  arrays = [file.array() for file in opened.files.values()]
  yield _record('open', 'file', time.perf_counter() - start, num_bytes)
  del arrays
  opened.close()


def _mapped(
  params: dict, folder: pathlib.Path
) -> tuple[dict, dict[str, RowFile]]:
  """The parameters with mapped tables, and the files."""
  store = row_store.open_at(folder / 'mapped', 0)
  tables = {name: file.array() for name, file in store.files.items()}
  rest, _ = table_leaves.split(params)
  return table_leaves.joined(rest, tables), store.files


def _record(task: str, name: str, seconds: float, num_bytes: int = 0) -> dict:
  return dict(
    task=task,
    contender=name,
    seconds=seconds,
    num_bytes=num_bytes,
    temp_bytes=None,
  )


def _cold(
  task: str,
  runs: dict[str, Callable],
  files: dict[str, RowFile],
  num_rounds: int,
) -> Iterator[dict]:
  """Median seconds of calls whose rows come from the disk, in turns."""
  seconds = {'device': [], 'file': []}
  for _ in range(num_rounds):
    for file in files.values():
      file.drop_pages()
      descriptor = os.open(file.path, os.O_RDONLY)
      os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
      os.close(descriptor)
    for name, found in seconds.items():
      start = time.perf_counter()
      jax.block_until_ready(runs[name]())
      found.append(time.perf_counter() - start)
  for name, found in seconds.items():
    yield _record(f'{task}, cold', name, statistics.median(found))


def _rows(options, params, mapped, files) -> Iterator[dict]:
  """Reading rows, and nothing else."""
  task = f'{options.reads} rows'
  (path, table), *_ = table_leaves.split(params)[1].items()
  on_file = table_leaves.split(mapped)[1][path]
  rng = np.random.default_rng(0)
  small = table[: max(1, 320_000 // table[0].nbytes)]

  @jax.jit
  def add_up(table, ids):
    # A sum: rows that are written count less.
    return jnp.sum(table.at[ids].get(mode='promise_in_bounds'), axis=1)

  def reading(table):
    ids = jnp.asarray(rng.integers(0, len(table), options.reads, np.int32))
    return lambda: add_up(table, ids)

  runs = {
    'device': reading(table),
    'small table': reading(small),
    'file': reading(on_file),
  }
  contenders = {name: Contender(run) for name, run in runs.items()}
  yield from measuring.compare(task, contenders, options.rounds, least=True)
  yield from _cold(task, runs, files, options.rounds)


def _decoding(
  options, config: Config, params, mapped, files, batch_size: int
) -> Iterator[dict]:
  """One token for each of a batch."""
  task = f'decode, batch {batch_size}'
  model, length = config.model, options.seq_len
  cache = init_cache(model, batch_size, length)
  tokens = jax.random.randint(
    jax.random.key(1), (batch_size, 1), 0, model.vocab_size
  )

  @jax.jit
  def decode(params, cache, tokens):
    logits, _, _ = Transformer(model).apply(
      {'params': params},
      tokens,
      jnp.full_like(tokens, length - 1),
      jnp.ones_like(tokens),
      cache,
    )
    return jnp.argmax(logits[:, -1], axis=-1)

  rest, tables = table_leaves.split(params)
  again = table_leaves.joined(rest, jax.tree.map(jnp.copy, tables))
  runs = {
    'device': lambda: decode(params, cache, tokens),
    'file': lambda: decode(mapped, cache, tokens),
    'device, again': lambda: decode(again, cache, tokens),
  }
  np.testing.assert_array_equal(runs['device'](), runs['file']())
  contenders = {name: Contender(run) for name, run in runs.items()}
  yield from measuring.compare(task, contenders, options.rounds, least=True)
  yield from _cold(task, runs, files, options.rounds)


class _Training:
  """Steps of one run on one batch, one after another."""

  def __init__(self, step: Callable, state: step_lib.TrainState, batch: dict):
    self._step, self._state, self._batch = step, state, batch

  def __call__(self):
    self._state, metrics = self._step(self._state, self._batch)
    return metrics


def _training(
  options, config: Config, state, folder: pathlib.Path
) -> Iterator[dict]:
  task = f'train, {options.tokens} tokens'
  memory = config.model.memory
  on_file = dataclasses.replace(memory.table, store='file')
  stored_config = dataclasses.replace(
    config,
    model=dataclasses.replace(
      config.model, memory=dataclasses.replace(memory, table=on_file)
    ),
  )
  folder.mkdir(parents=True, exist_ok=True)
  tables = stored_tables.StoredTables(stored_config, folder)
  tables.create(print)
  rest = jax.jit(tables.init_parts)()[0]
  key = jax.random.key(0)
  shape = config.data.batch_size, config.data.seq_len
  tokens = jax.random.randint(key, shape, 0, config.model.vocab_size)
  batch = dict(
    tokens=tokens,
    targets=jnp.roll(tokens, -1, axis=1),
    positions=jnp.broadcast_to(jnp.arange(shape[1])[None], shape),
    segment_ids=jnp.ones(shape, jnp.int32),
    loss_weight=jnp.ones(shape),
  )
  again = jax.tree.map(jnp.copy, state)  # Both are donated.
  resident = jax.jit(
    lambda state, batch: step_lib.train_step(config, state, batch),
    donate_argnums=0,
  )
  runs = {
    'device': _Training(resident, state, batch),
    'file': _Training(tables.train_step, rest, batch),
    'device, again': _Training(resident, again, batch),
  }
  losses = [float(run()['loss']) for run in runs.values()]
  np.testing.assert_array_equal(losses, losses[0])
  contenders = {name: Contender(run) for name, run in runs.items()}
  yield from measuring.compare(task, contenders, options.rounds, least=True)
  yield from _cold(task, runs, tables.files, options.rounds)
  tables.close()


show = measuring.print_last


def summarize(records: list[dict]) -> None:
  """How fast what lies in files is, beside what lies in memory."""
  base = {r['task']: r for r in reversed(records)}
  for r in records:
    if r['contender'] == 'file' and base[r['task']] is not r:
      share = base[r['task']]['seconds'] / r['seconds']
      line = f'{r["task"]}: {share:.3f} times as fast on file'
      if 'median_seconds' in r:
        other = base[r['task']]['median_seconds'] / r['median_seconds']
        line += f', by medians {other:.3f}'
      print(line)


def draw(records: list[dict], path: str) -> None:
  """Times of what lies in files beside those in memory, into a PNG."""
  seconds = {(r['task'], r['contender']): r['seconds'] for r in records}
  warm = [t for t, name in seconds if name == 'device' and 'cold' not in t]
  with new_figure(path, height=4.0) as figure:
    axes = figure.subplots()
    axes.set_title('Tables in mapped files: time beside tables in memory')
    for i, (name, end) in enumerate({'warm': '', 'cold': ', cold'}.items()):
      ratios = [
        seconds[task + end, 'file'] / seconds[task + end, 'device']
        for task in warm
      ]
      place = [j + (i - 0.5) * 0.4 for j in range(len(warm))]
      # From 1, as a logarithmic axis has no other bottom that means something.
      heights = [ratio - 1 for ratio in ratios]
      axes.bar(place, heights, 0.4, bottom=1, color=COLOURS[i], label=name)
    axes.axhline(1.0, color='black', linewidth=0.8)
    axes.set_xticks(range(len(warm)), warm)
    axes.set_yscale('log')
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter('{x:g}')
    axes.set_ylabel('times as long')
    axes.legend()
