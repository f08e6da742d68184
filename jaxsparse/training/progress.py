"""What a run shows: a live bar on a terminal, plain lines anywhere else."""

import contextlib
from collections.abc import Iterator

import rich.console
import rich.progress

_FIELDS = (
  ('loss', 'loss {:.4f}'),
  ('bits_per_byte', '{:.3f} bits/byte'),
  ('tokens_per_second', '{:,.0f} tokens/s'),
  ('model_flop_utilization', 'MFU {:.1%}'),
)


class Reporter:
  """Prints sentences and keeps one line about each task under way."""

  def __init__(self, is_silent: bool = False):
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

  def say(self, text: str) -> None:
    self._console.print(text, markup=False, highlight=False)

  @contextlib.contextmanager
  def steps(self, first: int, total: int, what: str) -> Iterator[None]:
    """Shows a bar for `what` until the block ends; bars may be nested."""
    if self._console.is_terminal and not self._tasks:
      self._progress.start()
    task = self._progress.add_task(
      what, total=total, completed=first, status='compiling'
    )
    self._tasks.append(task)
    try:
      yield
    finally:
      self._tasks.remove(task)
      if self._console.is_terminal and not self._tasks:
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
      self.say(f'step {step}/{total}  {status}{left}')


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else (
    f'{minutes}:{seconds:02}'
  )  # fmt: skip
