# SPDX-License-Identifier: Apache-2.0
"""Runs a comparison three times: stopped in its second run, ended, again.

  python tests/experiments/compare/stopped_comparison.py FOLDER

A process of its own, because it sends itself a signal. Prints how often
training had started after each time.
"""

import dataclasses
import json
import pathlib
import signal
import sys

from small_suite import facts_suite

from jaxsparse.experiments.compare import command as entry
from jaxsparse.training import loop


def main(folder: pathlib.Path) -> None:
  fit, starts, counts = loop.fit, [], []

  def counted_fit(config, workdir, data, reporter, utilization):
    starts.append(workdir)
    if len(starts) == 2:
      data = dataclasses.replace(data, batches=_Stopping(data.batches))
    return fit(config, workdir, data, reporter, utilization)

  loop.fit = counted_fit
  suite = facts_suite(folder / 'cache')
  for _ in range(3):
    entry.compare(suite, str(folder / 'work'))
    counts.append(len(starts))
  print(json.dumps(counts))


class _Stopping:
  """Batches, the first of which comes with a SIGTERM."""

  def __init__(self, batches):
    self._batches = batches

  def __next__(self):
    signal.raise_signal(signal.SIGTERM)
    return next(self._batches)

  def __getattr__(self, name):
    return getattr(self._batches, name)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
