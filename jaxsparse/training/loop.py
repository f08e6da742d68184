"""The loop: restore, step, report one step late, save, evaluate."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from etils import epath

from jaxsparse import mesh
from jaxsparse.config import Config
from jaxsparse.config.errors import UserError
from jaxsparse.data.pipeline import merge_states
from jaxsparse.run import checkpoint, hosts, peers, provenance
from jaxsparse.run.interrupt import Agreement, StopRequest, stop_on_signals
from jaxsparse.run.metrics import MetricsWriter, validation_losses
from jaxsparse.run.progress import Reporter
from jaxsparse.training import evaluation, resume
from jaxsparse.training.step import (
  TrainState,
  init_state,
  train_step,
  up_to_date,
)


@dataclasses.dataclass(frozen=True)
class TrainingData:
  """What the loop reads."""

  # Endless batches of this process, [B / processes, T], with `get_state` and
  # `set_state`.
  batches: Any
  # A fixed pass over the validation text, in the same form.
  validation: Callable[[], Iterable[dict[str, np.ndarray]]]
  # UTF-8 bytes of the validation text.
  validation_bytes: int
  # Bytes of text for each target, to state training losses in bits per byte.
  bytes_per_target: float


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How the loop ended."""

  step: int
  params: dict
  # None when a signal stopped the run.
  validation: evaluation.Validation | None


class _Clock:
  """Tokens per second since the last reading, without the pauses."""

  def __init__(self, tokens_per_step: int):
    self.tokens_per_step = tokens_per_step
    self._steps, self._start = 0, None

  def restart(self) -> None:
    self._steps, self._start = 0, time.perf_counter()

  def tick(self) -> float | None:
    """Tokens per second over the steps since `restart`.

    None for the first step of all, which compiles.
    """
    if self._start is None:
      self.restart()
      return None
    self._steps += 1
    elapsed = time.perf_counter() - self._start
    return self._steps * self.tokens_per_step / max(elapsed, 1e-9)


def fit(
  config: Config,
  workdir: epath.PathLike,
  data: TrainingData,
  reporter: Reporter,
  utilization: Callable[[float], float | None],
) -> Outcome:
  """Trains from the workdir's newest checkpoint to `train.num_steps`.

  Runs on the mesh in use (`jax.set_mesh`).

  Args:
    config: of the run.
    workdir: existing, and this config's own.
    data: batches and validation text.
    reporter: shows what happens.
    utilization: from tokens per second to model FLOP utilisation, if known.

  Raises:
    UserError: the batch does not fit the mesh, the disk is full, no checkpoint
      can be read, or the loss is not finite.
  """
  _check_batch(config)
  tell_of_warmup(config, reporter)
  checkpoints = checkpoint.Checkpoints(
    workdir, config.train.keep_checkpoints, config.train.keep_best
  )
  with stop_on_signals(config.train.stop_signals) as stop:
    state = _restore_or_init(config, workdir, checkpoints, data, reporter)
    run = _Run(config, workdir, data, checkpoints, reporter, utilization, stop)
    try:
      # Before what follows waits for others that no longer come.
      with peers.all_end_together():
        return run.to_the_end(state)
    finally:
      data.batches.close()
      run.close()


def _restore_or_init(
  config: Config,
  workdir: epath.PathLike,
  checkpoints: checkpoint.Checkpoints,
  data: TrainingData,
  reporter: Reporter,
) -> TrainState:
  init = functools.partial(init_state, config)
  abstract = mesh.abstract(init, mesh=jax.sharding.get_mesh())
  num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract))
  # One more than are kept: the oldest goes when the newest is complete.
  num_kept = config.train.keep_checkpoints + config.train.keep_best
  room = num_bytes * (num_kept + 1)
  optimizer = {'step': abstract.step, 'opt_state': abstract.opt_state}
  restored = checkpoints.restore(abstract.params, optimizer, reporter.say)
  if restored is None:
    checkpoint.check_disk_space(workdir, room)
    reporter.say('Compiling the first parameters ...')
    return jax.jit(init)()
  step, params, optimizer, record = restored
  data.batches.set_state(record['data'])
  reporter.say(f'Going on from the checkpoint of step {step}.')
  for change in resume.rate_changes(record, config, step):
    reporter.say(f'Changed since then: {change}.')
  return TrainState(optimizer['step'], params, optimizer['opt_state'])


def tell_of_warmup(config: Config, reporter: Reporter) -> None:
  """Says if the run is too short for its warm-up."""
  asked, num_steps = config.optimizer.warmup_steps, config.train.num_steps
  if (warmup := config.optimizer.warmup_within(num_steps)) < asked:
    reporter.say(
      f'optimizer.warmup_steps = {asked} is no less than train.num_steps = '
      f'{num_steps}: the warm-up takes {warmup} steps.'
    )


def _check_batch(config: Config) -> None:
  pieces = mesh.num_token_shards()
  micro = config.data.batch_size // config.optimizer.grad_accumulation
  if micro % pieces:
    raise UserError(
      'data.batch_size / optimizer.grad_accumulation must be a multiple of '
      f'mesh.data x mesh.sparse = {pieces}, got {micro}.'
    )


class _Run:
  """One start of the loop, from the restored state to the end or a signal."""

  def __init__(
    self,
    config: Config,
    workdir: epath.PathLike,
    data: TrainingData,
    checkpoints: checkpoint.Checkpoints,
    reporter: Reporter,
    utilization: Callable[[float], float | None],
    stop: StopRequest,
  ):
    self.config, self.workdir, self.data = config, workdir, data
    self.checkpoints, self.reporter = checkpoints, reporter
    self.utilization, self.stop = utilization, stop
    self.clock = _Clock(config.data.batch_size * config.data.seq_len)
    self.up_to_date = jax.jit(functools.partial(up_to_date, config))
    self.writer: MetricsWriter | None = None
    self.told_of_budget = False
    # Of what is in use, which may no longer be what the workdir holds.
    self.provenance = provenance.record(config, workdir)
    self.has_validated = False

  def close(self) -> None:
    if self.writer is not None:
      self.writer.close()
    self.checkpoints.close()

  def to_the_end(self, state: TrainState) -> Outcome:
    total = self.config.train.num_steps
    step = int(state.step)
    self.writer = MetricsWriter(
      self.config, self.workdir, step, self.reporter.say
    )
    train = jax.jit(
      functools.partial(train_step, self.config), donate_argnums=0
    )
    pending, stopped = None, False
    is_to_stop = Agreement(self.stop)
    losses = self._recall_losses()
    if self._is_to_validate(step) and step not in losses:
      # A kill or a stop came between the checkpoint and the pass.
      stopped = self._validate(step, state) is None
    with self.reporter.steps(step, total, 'training'):
      while step < total and not stopped:
        batch = evaluation.to_global(next(self.data.batches))
        state, metrics = train(state, batch)
        step += 1
        if step == total:
          state = self.up_to_date(state)
        if pending is not None:
          # The next step runs while the host waits for the one before it.
          self._report(*pending)
        pending = (step, metrics)
        is_to_save = step % self.config.train.save_every == 0 or step == total
        is_to_validate = self._is_to_validate(step)
        if is_to_save or is_to_validate:
          self._report(*pending)
          pending = None
        if is_to_save:
          self._save(step, state)
        if is_to_validate:
          result = self._validate(step, state)
          stopped = result is None
          if result and self.checkpoints.is_among_best(step):
            self._save(step, state)
        stopped = stopped or is_to_stop()
      if pending is not None:
        self._report(*pending)
    validation = None if stopped else self._validate(step, state)
    if validation is None:
      self._save(step, state)
      self.checkpoints.wait()
      self.reporter.say(
        f'{self.stop.signal_name or "A signal"}: saved step {step} of {total}; '
        'the same command goes on from there.'
      )
    return Outcome(step, state.params, validation)

  def _recall_losses(self) -> dict[int, float]:
    """The validation losses of the starts before this one."""
    found = list(validation_losses(self.workdir).items())
    # All processes must keep the same checkpoints.
    losses = dict(hosts.gather(found)[0])
    for step in self.checkpoints.steps():
      if step in losses:
        self.checkpoints.note_loss(step, losses[step])
    return losses

  def _is_to_validate(self, step: int) -> bool:
    train = self.config.train
    is_due = bool(train.eval_every) and step % train.eval_every == 0
    return is_due and 0 < step < train.num_steps

  def _report(self, step: int, metrics: dict[str, jax.Array]) -> None:
    scalars = {k: float(v) for k, v in jax.device_get(metrics).items()}
    loss = scalars['loss']
    if not (math.isfinite(loss) and math.isfinite(scalars['grad_norm'])):
      self.checkpoints.wait()
      kept = self.checkpoints.steps()
      raise UserError(
        f'the loss is {loss} and the gradient norm {scalars["grad_norm"]} at '
        f'step {step}: the last good state kept is '
        f'{f"step {kept[-1]}" if kept else "none yet"}; lower '
        'optimizer.learning_rate or set optimizer.clip_norm.'
      )
    over_budget = int(scalars.get('value_rows_over_budget', 0))
    if over_budget and not self.told_of_budget:
      self.told_of_budget = True
      self.reporter.say(
        f'Step {step} read {over_budget:,} rows of value tables beyond '
        'optimizer.value_row_budget: they take further passes, no gradient is '
        'lost. value_rows_over_budget in the metrics has all steps.'
      )
    scalars['bits_per_byte'] = loss / math.log(2) / self.data.bytes_per_target
    speed = self.clock.tick()
    total = self.config.train.num_steps
    seconds_left = None
    if speed is not None:
      scalars['tokens_per_second'] = speed
      utilization = self.utilization(speed)
      if utilization is not None:
        scalars['model_flop_utilization'] = utilization
      seconds_left = (total - step) * self.clock.tokens_per_step / speed
    is_logged = step % self.config.train.log_every == 0 or step in (1, total)
    self.reporter.show(step, total, scalars, seconds_left, is_logged)
    if is_logged:
      self.writer.write(step, scalars)
      self.clock.restart()

  def _save(self, step: int, state: TrainState) -> None:
    self.checkpoints.save(
      step,
      state.params,
      {'step': state.step, 'opt_state': state.opt_state},
      {
        'data': merge_states(hosts.gather(self.data.batches.get_state())),
        **self.provenance,
      },
    )
    self.writer.sync()
    self.clock.restart()

  def _validate(
    self, step: int, state: TrainState
  ) -> evaluation.Validation | None:
    result = evaluation.validate(
      self.config,
      self.up_to_date(state).params,
      self.data.validation(),
      self.data.validation_bytes,
      self.reporter,
      Agreement(self.stop),
      compiles=not self.has_validated,
    )
    self.has_validated = True
    self.clock.restart()
    if result is None:
      return None
    self.checkpoints.note_loss(step, result.loss)
    if step not in validation_losses(self.workdir):
      self.writer.write(step, result.scalars())
    self.reporter.say(
      f'step {step}  validation loss {result.loss:.4f} nats/token  '
      f'{result.bits_per_byte:.4f} bits/byte'
    )
    return result
