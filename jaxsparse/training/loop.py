# SPDX-License-Identifier: Apache-2.0
"""The loop: restore, step, report one step late, save, evaluate."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxsparse.config import Config
from jaxsparse.config.errors import UserError
from jaxsparse.data.pipeline import merge_states
from jaxsparse.run import checkpoint, hosts, peers, provenance, start
from jaxsparse.run.interrupt import Agreement, StopRequest, stop_on_signals
from jaxsparse.run.metrics import validation_losses
from jaxsparse.run.progress import Reporter
from jaxsparse.training import (
  adapter_run,
  adapters,
  before_start,
  evaluation,
  first_state,
  loss_scale,
  pair_validation,
  rows_moved,
  start_from,
  stored_tables,
  trained_part,
  trained_rows,
)
from jaxsparse.training.step import TrainState, finalize, train_step
from jaxsparse.training.step_reports import StepReports

Result = evaluation.Validation | pair_validation.PairValidation


@dataclasses.dataclass(frozen=True)
class TrainingData:
  """What the loop reads."""

  # Endless batches of this process, [B / processes, T], with `get_state` and
  # `set_state`.
  batches: Any
  # A fixed pass over the validation text, in the same form; none of pairs.
  validation: Callable[[], Iterable[dict[str, np.ndarray]]] = tuple
  # UTF-8 bytes of the validation text.
  validation_bytes: int = 0
  # Bytes of text for each target, to state training losses in bits per byte.
  bytes_per_target: float = 0.0
  # `validation` and its bytes of the text that was learned before, if it is
  # known.
  old_validation: Callable[[], Iterable[dict[str, np.ndarray]]] | None = None
  old_validation_bytes: int = 0
  # What rows are ranked by, if they are trained.
  ranked_by: trained_rows.Texts | None = None
  # In place of text the pairs to validate on.
  pairs: pair_validation.HeldOut | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How the loop ended."""

  step: int
  params: dict
  # None when a signal stopped the run.
  validation: Result | None


def jitted_step(config: Config) -> Callable[..., Any]:
  """`train_step` of a config, which takes the memory of its state."""
  return jax.jit(functools.partial(train_step, config), donate_argnums=0)


def fit(
  config: Config,
  workdir: epath.PathLike,
  data: TrainingData,
  reporter: Reporter,
  utilization: Callable[[float], float | None],
  read: start_from.Read = checkpoint.load_params,
  make_step: Callable[[Config], Callable[..., Any]] = jitted_step,
) -> Outcome:
  """Trains from the workdir's newest checkpoint to `train.num_steps`.

  Runs on the mesh in use (`jax.set_mesh`).

  Args:
    config: of the run.
    workdir: existing, and this config's own.
    data: batches and validation text.
    reporter: shows what happens.
    utilization: from tokens per second to model FLOP utilisation, if known.
    read: reads the checkpoint that `train.start_from` names.
    make_step: makes the jitted `train_step`; none of it with tables on file.

  Raises:
    UserError: the batch does not fit the mesh, the disk is full, no checkpoint
      can be read, or the loss is not finite.
  """
  before_start.check_batch(config)
  before_start.tell_of_warmup(config, reporter)
  total = config.train.num_steps
  checkpoints = checkpoint.Checkpoints(
    workdir, config.train.keep_checkpoints, config.train.keep_best
  )
  train = make_step(config)
  finalized = finish = jax.jit(functools.partial(finalize, config))
  tables = stored_tables.of_run(config, workdir)
  if tables is not None:
    train, finalized = tables.train_step, tables.finalized
    finish = tables.finish
  begun_from = start.settled(config, workdir)
  with stop_on_signals(config.train.stop_signals) as stop:
    state, frozen = first_state.restored_or_begun(
      config, workdir, checkpoints, data.batches, data.ranked_by, reporter,
      train, tables, begun_from, read,
    )  # fmt: skip
    # Of what is in use, which may no longer be what the workdir holds.
    origin = provenance.record(config, workdir)
    keep = functools.partial(adapters.saved, config, frozen)
    write = adapter_run.writer(config, workdir, begun_from, frozen, state)
    if begun_from is not None:
      origin |= {'start': dataclasses.asdict(begun_from)}
    if config.optimizer.trained:
      reporter.say(
        trained_part.describe(config.optimizer, state.params, frozen)
      )
    reports = None
    try:
      # Before what follows waits for others that no longer come.
      with peers.all_end_together():
        step = int(state.step)
        reports = StepReports(
          config, workdir, step, data.bytes_per_target, reporter, utilization
        )
        report = functools.partial(_report, reports, checkpoints)
        save = functools.partial(
          _save, reports, checkpoints, data, origin, tables, keep, write
        )

        def whole(state):
          return adapters.join(config, frozen, finalized(state).params)

        validate = functools.partial(
          _validate, config, reports, checkpoints, data, reporter, stop
        )
        is_to_stop = Agreement(stop)
        pending, stopped = None, False
        losses = _recall_losses(workdir, checkpoints)
        # What a run begins with, what it learns and forgets is compared to.
        begins = step == 0 and (
          begun_from is not None or data.old_validation is not None
        )
        if (begins or _is_to_validate(config, step)) and step not in losses:
          # A kill or a stop came between the checkpoint and the pass.
          stopped = validate(step, whole(state)) is None
        with reporter.steps(step, total, 'training'):
          while step < total and not stopped:
            batch = evaluation.to_global(next(data.batches))
            state, metrics = train(state, batch, frozen)
            step += 1
            if step == total:
              state = finish(state)
            if pending is not None:
              # The next step runs while the host waits for the one before it.
              report(*pending)
            pending = (step, metrics)
            is_to_save = step % config.train.save_every == 0 or step == total
            is_to_validate = _is_to_validate(config, step)
            if is_to_save or is_to_validate:
              report(*pending)
              pending = None
            if is_to_save:
              save(step, state)
            if is_to_validate:
              result = validate(step, whole(state))
              stopped = result is None
              if result and checkpoints.is_among_best(step):
                save(step, state)
            stopped = stopped or is_to_stop()
          if pending is not None:
            report(*pending)
        params = whole(state)
        validation = None if stopped else validate(step, params)
        if validation is None:
          save(step, state)
          checkpoints.wait()
          reporter.say(
            f'{stop.signal_name or "A signal"}: saved step {step} of {total}; '
            'the same command goes on from there.'
          )
        else:
          # Its moments take as much room as what is read now.
          del state
          args = config, params, begun_from, reporter.say, read
          reports.show_moved(step, rows_moved.since_start(*args))
        return Outcome(step, adapters.merged(params), validation)
    finally:
      data.batches.close()
      if reports is not None:
        reports.close()
      checkpoints.close()
      if tables is not None:
        tables.close()


def _recall_losses(
  workdir: epath.PathLike, checkpoints: checkpoint.Checkpoints
) -> dict[int, float]:
  """The validation losses of the starts before this one."""
  found = list(validation_losses(workdir).items())
  # All processes must keep the same checkpoints.
  losses = dict(hosts.gather(found)[0])
  for step in checkpoints.steps():
    if step in losses:
      checkpoints.note_loss(step, losses[step])
  return losses


def _is_to_validate(config: Config, step: int) -> bool:
  train = config.train
  is_due = bool(train.eval_every) and step % train.eval_every == 0
  return is_due and 0 < step < train.num_steps


def _report(
  reports: StepReports,
  checkpoints: checkpoint.Checkpoints,
  step: int,
  metrics: dict[str, jax.Array],
) -> None:
  scalars = {k: float(v) for k, v in jax.device_get(metrics).items()}
  loss, norm = scalars['loss'], scalars['grad_norm']
  scale = scalars.get('loss_scale', 0)
  is_left_out = scale > loss_scale.LEAST and not math.isfinite(norm)
  is_finite = math.isfinite(loss) and math.isfinite(norm)
  if not (is_finite or is_left_out):
    checkpoints.wait()
    kept = checkpoints.steps()
    advice = 'lower optimizer.learning_rate or set optimizer.clip_norm'
    if scale:
      advice = (
        "model.dtype = 'float16' overflows without a loss scale, too, so lower "
        "optimizer.learning_rate or go on in 'bfloat16' or 'float32'"
      )
    raise UserError(
      f'the loss is {loss} and the gradient norm {norm} at step {step}: the '
      f'last good state kept is {f"step {kept[-1]}" if kept else "none yet"}; '
      f'{advice}.'
    )
  reports.show_step(step, scalars)


def _save(
  reports: StepReports,
  checkpoints: checkpoint.Checkpoints,
  data: TrainingData,
  origin: dict,
  tables: stored_tables.StoredTables | None,
  keep: Callable[[dict], dict],
  write_adapter: adapter_run.Write,
  step: int,
  state: TrainState,
) -> None:
  if tables is not None:
    origin = origin | tables.seal(step)
  checkpoints.save(
    step,
    keep(state.params),
    {'step': state.step, 'opt_state': state.opt_state}
    | ({} if state.loss_scale is None else {'loss_scale': state.loss_scale}),
    {'data': merge_states(hosts.gather(data.batches.get_state())), **origin},
  )
  write_adapter(step, state.params)
  reports.sync()


def _validate(
  config: Config,
  reports: StepReports,
  checkpoints: checkpoint.Checkpoints,
  data: TrainingData,
  reporter: Reporter,
  stop: StopRequest,
  step: int,
  params: dict,
) -> Result | None:
  """The pass over what is held out; None if a signal stopped it."""
  texts = [(data.validation, data.validation_bytes)]
  if data.old_validation is not None:
    texts.append((data.old_validation, data.old_validation_bytes))
  run, held_out = evaluation.of_texts, texts
  if data.pairs is not None:
    run, held_out = pair_validation.validate, data.pairs
  result = run(
    config,
    params,
    held_out,
    reporter,
    Agreement(stop),
    compiles=not reports.has_validated,
  )
  if result is not None:
    # One of step 0 is not saved unless it was given.
    if step or 0 in checkpoints.steps():
      checkpoints.note_loss(step, result.loss)
    reports.show_validation(step, result)
  return result
