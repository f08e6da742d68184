# SPDX-License-Identifier: Apache-2.0
"""What the loop begins with: restored, given, or drawn."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from jaxsparse import mesh
from jaxsparse.config import Config
from jaxsparse.run import checkpoint, disk, start
from jaxsparse.run.progress import Reporter
from jaxsparse.training import (
  adapter_run,
  adapters,
  former_state,
  loss_scale,
  resume,
  start_from,
  stored_tables,
  trained_rows,
)
from jaxsparse.training.compile_beside import abstract_batch, compiling_beside
from jaxsparse.training.optimizer import is_by_rows
from jaxsparse.training.step import (
  TrainState,
  init_parts,
  optimizer_of,
  parts_from,
)


def restored_or_begun(
  config: Config,
  workdir: epath.PathLike,
  checkpoints: checkpoint.Checkpoints,
  batches: Any,
  ranked_by: trained_rows.Texts | None,
  reporter: Reporter,
  train: Callable,
  tables: stored_tables.StoredTables | None,
  begun_from: start.Start | None,
  read: start_from.Read,
) -> tuple[TrainState, dict]:
  """The state of the newest checkpoint, or that before the first step.

  On the mesh in use; where a run begins, its first step is compiled meanwhile.

  Args:
    config: of the run.
    workdir: likewise.
    checkpoints: of the workdir.
    batches: of the run, which go on where the checkpoint was.
    ranked_by: what rows are ranked by, if they are trained.
    reporter: shows what happens.
    train: the step that is to be compiled.
    tables: those that lie on file, if some do.
    begun_from: what another workdir gives, if one does.
    read: reads its checkpoint.

  Returns:
    The state, and what is frozen beside it.

  Raises:
    UserError: the disk is full, or no checkpoint can be read.
  """
  base, first = None, functools.partial(init_parts, config)
  if config.adapter.kind:
    assert begun_from is not None
    base = start_from.load_params(config, begun_from, reporter.say, read)
    base = adapter_run.begin(
      config, workdir, base, begun_from, ranked_by, reporter
    )
    first = functools.partial(parts_from, config, base)
  init = jax.jit(first if tables is None else tables.init_parts)  # Traced once.
  abstract, frozen = mesh.abstract(init, mesh=jax.sharding.get_mesh())
  # What a checkpoint holds.
  params = adapters.saved(config, frozen, abstract.params)
  kept = abstract.opt_state, params
  num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))
  # One more than are kept: the oldest goes when the newest is complete.
  num_kept = config.train.keep_checkpoints + config.train.keep_best
  room = num_bytes * (num_kept + 1)
  former, states = None, []
  if base is None:
    former = former_state.layout(config, params) if tables is None else None
    record = checkpoint.read_record(workdir) or {}
    states = former_state.of_other_parts(config, params, record)
  states = [abstract.opt_state, *([former] if former else []), *states]
  # The same run may have it with another type of activations.
  first_scale = functools.partial(loss_scale.first, 'float16')
  scale = {
    'loss_scale': mesh.abstract(first_scale, mesh=jax.sharding.get_mesh())
  }
  is_scaled = abstract.loss_scale is not None
  layout, *others = (
    {'step': abstract.step, 'opt_state': state} | (scale if has_scale else {})
    for state in states
    for has_scale in (is_scaled, not is_scaled)
  )
  restored = checkpoints.restore(params, layout, reporter.say, others)
  program = (train, abstract, abstract_batch(config), frozen)
  elsewhere = {} if tables is None else tables.shapes
  if tables is not None:
    program = (tables.program, abstract, tables.abstract, *program[2:])
  if restored is None:
    disk.check_disk_space(workdir, room)
    if begun_from is not None:
      with compiling_beside(*program):
        if tables is not None:
          tables.create(reporter.say, start_from.given_tables(begun_from))
        given = base or start_from.load_params(
          config, begun_from, reporter.say, read
        )
        return jax.block_until_ready(parts_from(config, given, elsewhere))
    reporter.say('Compiling the first parameters ...')
    with compiling_beside(*program):
      if tables is not None:
        tables.create(reporter.say)
      return jax.block_until_ready(init())
  step, params, optimizer, record = restored
  if optimizer is None:
    disk.check_disk_space(workdir, room)
    reporter.say('Beginning with the parameters that the workdir has.')
    with compiling_beside(*program):
      if tables is not None:
        tables.create_from(workdir, step, reporter.say)
      return jax.block_until_ready(parts_from(config, params, elsewhere))
  if tables is not None:
    tables.open(step, record)
  batches.set_state(record['data'])
  reporter.say(f'Going on from the checkpoint of step {step}.')
  for change in resume.rate_changes(record, config, step):
    reporter.say(f'Changed since then: {change}.')
  trained, frozen = adapters.parts(config, base, params)
  opt_state = former_state.converted(
    optimizer['opt_state'],
    former,
    abstract.opt_state,
    lambda: jax.jit(optimizer_of(config).init)(trained),
    is_by_rows(config.optimizer),
  )
  scale = None
  if is_scaled:
    scale = optimizer.get('loss_scale') or jax.jit(first_scale)()
  return TrainState(optimizer['step'], trained, opt_state, scale), frozen
