# SPDX-License-Identifier: Apache-2.0
"""What a run says of its steps: on the screen, and in the workdir's metrics."""

import math
import time
from collections.abc import Callable

from etils import epath

from jaxsparse.config import Config
from jaxsparse.run.metrics import MetricsWriter, read_rows, validation_losses
from jaxsparse.run.progress import Reporter
from jaxsparse.training.evaluation import Validation
from jaxsparse.training.pair_validation import PairValidation


class StepReports:
  """Shows and writes the metrics of one start of the loop."""

  def __init__(
    self,
    config: Config,
    workdir: epath.PathLike,
    step: int,
    bytes_per_target: float,
    reporter: Reporter,
    utilization: Callable[[float], float | None],
  ):
    """Opens the workdir's metrics.

    Args:
      config: of the run.
      workdir: existing.
      step: at which it starts.
      bytes_per_target: of text, to state losses in bits per byte; 0 where the
        loss is not one of text.
      reporter: shows what happens.
      utilization: from tokens per second to model FLOP utilisation, if known.
    """
    self._config, self._workdir = config, workdir
    self._bytes_per_target, self._utilization = bytes_per_target, utilization
    self._reporter = reporter
    self._writer = MetricsWriter(config, workdir, step, reporter.say)
    self._clock = _Clock(config.data.batch_size * config.data.seq_len)
    self._told_of_budget = self._told_of_overflow = False
    self.has_validated = False

  def show_step(self, step: int, scalars: dict[str, float]) -> None:
    self._tell_of_budget(step, scalars)
    self._tell_of_overflow(step, scalars)
    if self._bytes_per_target:
      bits = scalars['loss'] / math.log(2)
      scalars['bits_per_byte'] = bits / self._bytes_per_target
    total = self._config.train.num_steps
    speed, seconds_left = self._clock.tick(), None
    if speed is not None:
      scalars['tokens_per_second'] = speed
      utilization = self._utilization(speed)
      if utilization is not None:
        scalars['model_flop_utilization'] = utilization
      seconds_left = (total - step) * self._clock.tokens_per_step / speed
    is_logged = step % self._config.train.log_every == 0 or step in (1, total)
    self._reporter.show(step, total, scalars, seconds_left, is_logged)
    if is_logged:
      self._writer.write(step, scalars)
      self._clock.restart()

  def show_validation(
    self, step: int, result: Validation | PairValidation
  ) -> None:
    self.has_validated = True
    if step not in validation_losses(self._workdir):
      self._writer.write(step, result.scalars())
    self._reporter.say(f'step {step}  {result.told()}')
    if step == self._config.train.num_steps:
      self._tell_of_change(result)
    self._clock.restart()

  def _tell_of_change(self, result: Validation | PairValidation) -> None:
    """What was learned and forgotten since step 0, if that is known."""
    first = next(iter(read_rows(self._workdir)), {})
    now = result.scalars()
    names = {
      'validation_bits_per_byte': 'new text',
      'old_validation_bits_per_byte': 'old text',
    }
    told = [
      f'{name} {first[key]:.4f} -> {now[key]:.4f}'
      for key, name in names.items()
      if first.get(key) is not None and key in now
    ]
    if first.get('step') == 0 and told:
      self._reporter.say(f'Bits per byte since step 0: {", ".join(told)}.')

  def show_moved(self, step: int, shares: dict[str, float]) -> None:
    """Of each table, the share of rows that moved since the run began."""
    if not shares:
      return
    rows = read_rows(self._workdir)
    if not rows or shares.keys().isdisjoint(rows[-1]):
      self._writer.write(step, shares)
    told = ', '.join(f'{name} {share:.1%}' for name, share in shares.items())
    self._reporter.say(
      f'Rows moved by more than 1 % of their norm since step 0: {told}.'
    )

  def sync(self) -> None:
    """What is written is kept, and the time that a save took is not counted."""
    self._writer.sync()
    self._clock.restart()

  def close(self) -> None:
    self._writer.close()

  def _tell_of_budget(self, step: int, scalars: dict[str, float]) -> None:
    over_budget = int(scalars.get('value_rows_over_budget', 0))
    if over_budget and not self._told_of_budget:
      self._told_of_budget = True
      self._reporter.say(
        f'Step {step} read {over_budget:,} rows of value tables beyond '
        'optimizer.value_row_budget: they take further passes, no gradient is '
        'lost. value_rows_over_budget in the metrics has all steps.'
      )

  def _tell_of_overflow(self, step: int, scalars: dict[str, float]) -> None:
    is_left_out = not math.isfinite(scalars['grad_norm'])
    if is_left_out and not self._told_of_overflow:
      self._told_of_overflow = True
      self._reporter.say(
        f'Step {step} is left out: its gradients overflow float16 at the loss '
        f'scale {scalars["loss_scale"]:,.0f}, of which the next steps have '
        'half. overflows in the metrics counts such steps.'
      )


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
