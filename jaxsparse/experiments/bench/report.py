# SPDX-License-Identifier: Apache-2.0
"""What benches find: each row is printed and written when it is measured."""

import argparse
import contextlib
import json
import pathlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from jaxsparse.config.errors import UserError
from jaxsparse.run import workdir


class Report:
  """The machine, what was asked for, and the rows so far.

  A bench is a module with `OPTIONS`, `measure(options)`, which yields a record
  of each row, `show(records)`, which prints the last of them, and perhaps
  `summarize(records)`, for the end.
  """

  def __init__(self, name: str, content: dict[str, Any]):
    """Starts a report.

    Args:
      name: of the JSON file, which is whole after every row; '' for none.
      content: what it begins with.

    Raises:
      UserError: the file can't be written.
    """
    self.content = content
    self._path = pathlib.Path(name).expanduser() if name else None
    if self._path:
      with self._errors():
        self._path.open('a').close()

  def write(self) -> None:
    if self._path is None:
      return
    content = json.dumps(self.content, indent=2) + '\n'
    with self._errors():
      if self._path.is_file():
        workdir.write_whole(self._path, content.encode())
      else:  # Such as /dev/stdout.
        self._path.write_text(content)

  @contextlib.contextmanager
  def _errors(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise UserError(
        f"--json={str(self._path)!r} can't be written ({error.strerror})."
      ) from error

  def add(
    self, bench: ModuleType, options: dict[str, Any], results: list[dict]
  ) -> None:
    """Measures; `results`, a part of the content, gets the rows."""
    for record in bench.measure(argparse.Namespace(**options)):
      results.append(record)
      bench.show(results)
      sys.stdout.flush()
      self.write()
    if results and hasattr(bench, 'summarize'):
      bench.summarize(results)
