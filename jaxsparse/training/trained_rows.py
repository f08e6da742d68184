# SPDX-License-Identifier: Apache-2.0
"""Which rows of its base's memories a run trains: ranked once, then kept.

A base's keys and queries stay as they are, so what a text reads hardly moves
while its rows are trained, and the rows are chosen before the first step. A
resumed run takes those that the workdir has.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from etils import epath

from jaxsparse.config import Config
from jaxsparse.config.errors import require
from jaxsparse.nn import row_deltas
from jaxsparse.ops.memory.row_ranking import best_rows, share_of_reads
from jaxsparse.run import adapter_files, hosts, start
from jaxsparse.run.progress import Reporter
from jaxsparse.training import row_reads
from jaxsparse.training.micro_batches import Batch

# Of a workdir: the rows, and by what they were ranked.
FOLDER = 'ranking'

# Tokens of the new text whose reads are compared after training.
_COMPARED_TOKENS = 2**16


@dataclasses.dataclass(frozen=True)
class Texts:
  """Passes over the texts that rows are ranked by, anew with each call."""

  # This process's rows of the batches of the training text.
  new: Callable[[], Iterable[Batch]]
  # Likewise of the background.
  background: Callable[[], Iterable[Batch]]


def with_rows(
  config: Config,
  workdir: epath.PathLike,
  base: Any,
  begun_from: start.Start,
  texts: Texts | None,
  reporter: Reporter,
) -> Any:
  """The base, with room for differences of the rows that the run trains.

  Args:
    config: of the run.
    workdir: of it.
    base: parameters on the mesh in use.
    begun_from: where they are from.
    texts: to rank by, if the workdir has no rows yet.
    reporter: shows the progress.

  Raises:
    UserError: the model has no memory layers, the texts tell no row from
      another, or what the workdir has is damaged or of another base.
  """
  require(
    config.model.memory is not None,
    "adapter.kind = 'rows' needs a base with memory layers, and the model of "
    'train.start_from has none: add some (jaxsparse convert add-memory), or '
    "train kind = 'lora'.",
  )
  folder = epath.Path(workdir) / FOLDER
  # All processes see what process 0 does.
  if hosts.gather((folder / adapter_files.JSON).exists())[0]:
    tensors, meta = adapter_files.read(folder)
    adapter_files.require_base(folder, meta, begun_from.fingerprint)
    rows = {name.removesuffix('/rows'): x for name, x in tensors.items()}
    return row_deltas.learnt(base, rows)
  assert texts is not None
  rows = _rank(config, base, texts, reporter)
  if hosts.is_process_zero():
    tensors = {f'{owner}/rows': found for owner, found in rows.items()}
    meta = dict(kind='rows', base=begun_from.fingerprint)
    adapter_files.write(folder, tensors, meta)
  return row_deltas.learnt(base, rows)


def _rank(
  config: Config, base: Any, texts: Texts, reporter: Reporter
) -> dict[str, np.ndarray]:
  adapter = config.adapter
  per_batch = config.data.batch_size * config.data.seq_len
  most = max(1, adapter.ranking_tokens // per_batch)
  counts = row_reads.count(
    config.model,
    base,
    itertools.islice(texts.new(), most),
    itertools.islice(texts.background(), most),
    adapter.ranking_unit,
    reporter,
  )
  rows = best_rows(counts, adapter.ranking, adapter.num_rows)
  found = sum(map(len, rows.values()))
  require(
    found > 0,
    f'adapter.ranking = {adapter.ranking!r} finds no row that the text reads '
    'more than the background: lower adapter.ranking_unit, or name another '
    'background by data.replay.',
  )
  if found < adapter.num_rows:
    reporter.say(
      f'adapter.num_rows = {adapter.num_rows:,}, but no more than {found:,} '
      'rows are read more by the text than by the background.'
    )
  for owner, own in rows.items():
    new, old = share_of_reads(counts[owner], own)
    reporter.say(
      f'{len(own):,} rows of {owner}: {new:.1%} of the reads by the text, '
      f'{old:.1%} of those by the background.'
    )
  return rows


def tell_of_moved_reads(
  config: Config, params: Any, texts: Texts, reporter: Reporter
) -> float:
  """Says how many of the text's reads have moved to other rows; their share.

  Args:
    config: of the run.
    params: after it, with differences beside the tables.
    texts: that rows were ranked by.
    reporter: shows the progress.
  """
  per_batch = config.data.batch_size * config.data.seq_len
  most = max(1, _COMPARED_TOKENS // per_batch)
  batches = itertools.islice(texts.new(), most)
  base = row_deltas.without(params)
  share = row_reads.moved_share(config.model, base, params, batches, reporter)
  reporter.say(
    f'{share:.1%} of the reads by the text have moved to other rows since they '
    'were ranked.'
  )
  return share
