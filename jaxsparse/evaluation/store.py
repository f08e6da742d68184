# SPDX-License-Identifier: Apache-2.0
"""What an evaluation leaves: results, and the score of every item.

Scores are written as they come. Those of an evaluation that was stopped are
taken over by the next one if nothing has changed that they depend on.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from jaxsparse.config.errors import UserError
from jaxsparse.evaluation.scorer import Score
from jaxsparse.run import stored
from jaxsparse.run import workdir as workdir_lib

FOLDER = 'evaluations'

# Beside the tokenizer, of Hugging Face: which token begins a text.
_TOKENIZER_FILES = (*workdir_lib.TOKENIZERS, 'tokenizer_config.json')


def folder_of(workdir: str, output: str | None) -> pathlib.Path:
  """Where results go; the folder is made.

  Raises:
    UserError: it can't be made, or the workdir is an object store and no other
      folder is named.
  """
  if output is None and workdir_lib.is_remote(workdir):
    raise UserError(
      f'results are appended to, which {workdir!r} does not know: give '
      '--output=FOLDER.'
    )
  folder = pathlib.Path(output or f'{workdir}/{FOLDER}')
  workdir_lib.make_folder(folder, '--output' if output else '--workdir')
  return folder


def model_settings(workdir: str, step: int) -> dict:
  """What distinguishes a model: its checkpoint and its tokenizer."""
  tokenizer = hashlib.sha256()
  for name in _TOKENIZER_FILES:
    path = epath.Path(workdir) / name
    if path.exists():
      tokenizer.update(name.encode() + path.read_bytes())
  return dict(
    step=step,
    checkpoint_sha256=stored.digest(workdir, step),
    tokenizer_sha256=tokenizer.hexdigest(),
  )


def stem_of(task: str) -> str:
  """A task's name as files have it."""
  return re.sub(r'[^\w.-]+', '_', task).strip('_')


class Store:
  """The files of one task and checkpoint.

  Args:
    folder: of the results.
    step: of the checkpoint.
    task: its name.
    settings: on what the scores depend, anything JSON can hold.
  """

  def __init__(
    self, folder: pathlib.Path, step: int, task: str, settings: dict
  ):
    stem = stem_of(task)
    self.results = folder / f'{step}.{stem}.json'
    self.items = folder / f'{step}.{stem}.items.jsonl'
    self._settings = settings

  def scores(self, count: int) -> dict[int, Score]:
    """Scores that are there already, by the number of their sequence.

    None are if they are of other settings: then the file begins anew.

    Args:
      count: sequences of the task.
    """
    found, rows = {}, _rows(self.items)
    if rows[:1] != [self._settings]:
      return found
    for row in rows[1:]:
      with contextlib.suppress(KeyError, TypeError, ValueError):
        number = int(row['number'])
        if 0 <= number < count:
          found[number] = Score(float(row['logprob']), bool(row['is_greedy']))
    return found

  @contextlib.contextmanager
  def open(self) -> Iterator['Writer']:
    """For appending, behind the scores of these settings or to a new file."""
    goes_on = _rows(self.items)[:1] == [self._settings]
    with workdir_lib.write_errors(self.items.parent):
      flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
      with open(  # noqa: PTH123
        os.open(self.items, flags, 0o666), 'r+b', buffering=0
      ) as file:
        if not goes_on:
          file.truncate(0)
          file.write(_line(self._settings))
        elif os.pread(file.fileno(), 1, file.seek(0, os.SEEK_END) - 1) != b'\n':
          # A kill has cut the last line.
          file.write(b'\n')
        yield Writer(file)

  def finish(self, results: dict) -> None:
    """Writes the results."""
    content = json.dumps(results | {'settings': self._settings}, indent=2)
    with workdir_lib.write_errors(self.results.parent):
      workdir_lib.write_whole(self.results, content.encode() + b'\n')


class Writer:
  """Appends scores to the file of items."""

  def __init__(self, file: Any):
    self._file = file

  def write(self, rows: list[dict]) -> None:
    self._file.write(b''.join(map(_line, rows)))


def _line(row: dict) -> bytes:
  return json.dumps(row).encode() + b'\n'


def _rows(path: pathlib.Path) -> list[dict]:
  """Lines of a file that are whole; none if it is missing or damaged."""
  try:
    lines = path.read_bytes().split(b'\n')
  except OSError:
    return []
  rows = []
  for line in lines:
    with contextlib.suppress(ValueError):
      row = json.loads(line)
      if isinstance(row, dict):
        rows.append(row)
  return rows
