# SPDX-License-Identifier: Apache-2.0
"""What a run shows: a live bar on a terminal, plain lines anywhere else."""

import contextlib
import os
from collections.abc import Iterator

import rich.console
import rich.progress

from jaxsparse.run.printing import escape_unprintable

_FIELDS = (
  ('loss', 'loss {:.4f}'),
  ('bits_per_byte', '{:.3f} bits/byte'),
  ('tokens_per_second', '{:,.0f} tokens/s'),
  ('model_flop_utilization', 'MFU {:.1%}'),
  ('loss_scale', 'loss scale {:,.0f}'),
  ('overflows', '{:,.0f} overflows'),
)


class Reporter:
  """Prints sentences and keeps one line about each task under way.

  Output that nobody can read any more, as its terminal or pipe is closed, is
  dropped: the run goes on, or saves and stops if that was the terminal's wish.
  """

  def __init__(self, is_silent: bool = False):
    escape_unprintable()
    self._console = rich.console.Console(soft_wrap=True, quiet=is_silent)
    self._progress = rich.progress.Progress(
      rich.progress.TextColumn('{task.description}'),
      rich.progress.BarColumn(bar_width=20),
      rich.progress.MofNCompleteColumn(),
      rich.progress.TextColumn('{task.fields[status]}'),
      rich.progress.TimeRemainingColumn(),
      console=self._console,
    )
    self._tasks: list[rich.progress.TaskID] = []
    self._units: dict[rich.progress.TaskID, str] = {}

  def say(self, text: str) -> None:
    with self._unread_output_dropped():
      self._console.print(text, markup=False, highlight=False)

  @contextlib.contextmanager
  def steps(
    self,
    first: int,
    total: int,
    what: str,
    compiles: bool = True,
    unit: str = 'step',
  ) -> Iterator[None]:
    """Shows a bar for `what` until the block ends; bars may be nested.

    Args:
      first: steps done before.
      total: steps in all.
      what: names them.
      compiles: whether their program is made first.
      unit: before the numbers in lines where there is no bar.
    """
    is_outermost = self._console.is_terminal and not self._tasks
    if compiles and not self._console.is_terminal:
      self.say(f'Compiling {what} ...')
    if is_outermost:
      with self._unread_output_dropped():
        self._progress.start()
    status = 'Compiling ...' if compiles else ''
    task = self._progress.add_task(
      what, total=total, completed=first, status=status
    )
    self._units[task] = unit
    self._tasks.append(task)
    try:
      yield
    finally:
      self._tasks.remove(task)
      if is_outermost:
        with self._unread_output_dropped():
          self._progress.stop()
      self._progress.remove_task(task)

  def show(
    self,
    step: int,
    total: int,
    scalars: dict[str, float],
    seconds_left: float | None = None,
    is_logged: bool = False,
  ) -> None:
    """Moves the innermost bar; prints the steps that are logged."""
    status = '  '.join(
      form.format(scalars[name]) for name, form in _FIELDS if name in scalars
    )
    self._progress.update(self._tasks[-1], completed=step, status=status)
    if is_logged and not self._console.is_terminal:
      left = '' if seconds_left is None else f'  {_clock(seconds_left)} left'
      unit = self._units[self._tasks[-1]]
      self.say(f'{unit} {step}/{total}  {status}{left}'.rstrip())

  @contextlib.contextmanager
  def _unread_output_dropped(self) -> Iterator[None]:
    try:
      yield
    # Rich makes an exit of a closed pipe.
    except (OSError, SystemExit):
      self._console.quiet = True
      with contextlib.suppress(OSError, ValueError):
        # Python would write what is left at its exit, and fail.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._console.file.fileno())
        os.close(null)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else (
    f'{minutes}:{seconds:02}'
  )  # fmt: skip
