# SPDX-License-Identifier: Apache-2.0
"""Tables of a run that lie in files: what they are, and whether they are whole.

A start opens them in constant time, for which it compares a seal, lengths and
journals; --verify reads all that was ever written and compares it, too.
"""

import argparse
from collections.abc import Sequence

from jaxsparse.analysis.free_memory import words
from jaxsparse.config.errors import require
from jaxsparse.run import row_store, table_files
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.command_line import Parser


def main(argv: Sequence[str]) -> None:
  arguments = _parse(argv)
  workdir = workdir_lib.expanded(arguments.workdir)
  folder = table_files.folder_of(workdir)
  steps = row_store.sealed_steps(folder)
  require(
    bool(steps),
    f'workdir {workdir!r} has no tables on file: train with '
    "--config.model.memory.table.store='file'.",
  )
  step = steps[-1] if arguments.step is None else arguments.step
  store = row_store.open_at(folder, step)
  print(f'step {step} of {", ".join(map(str, steps))}')
  for name, leaf in store.leaves.items():
    shape = ' x '.join(f'{n:,}' for n in leaf.shape)
    size = words(leaf.num_rows * leaf.row_bytes)
    on_disk = words(store.files[name].disk_bytes())
    print(f'{name}: {shape} {leaf.dtype}, {size}, {on_disk} on the disk')
  if arguments.verify:
    store.verify()
    print('All rows are those that were sealed.')
  store.close()


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = Parser(
    prog='jaxsparse tables',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add('--workdir', required=True, help='folder of the training run')
  add('--step', type=int, help='of a checkpoint; the newest by default')
  add('--verify', action='store_true', help='compare all rows')
  return parser.parse_args(argv)
