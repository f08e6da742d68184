"""Pictures of a run: `python -m jaxsparse.report WORKDIR`.

Loss, rates and speed; for memory layers the use of slots and its unevenness
over training; for mixtures the load of the experts. Works while the run goes
on, and after it.
"""

import argparse
import sys

from jaxsparse import workdir as workdir_lib
from jaxsparse.analysis import run_pictures
from jaxsparse.errors import UserError
from jaxsparse.training import metrics


def main(arguments: list[str] | None = None) -> int:
  """Draws the pictures and names them; 1 after a sentence on bad input."""
  parser = argparse.ArgumentParser(prog='python -m jaxsparse.report')
  parser.add_argument('workdir', help='of a training run, begun or finished')
  options = parser.parse_args(arguments)
  try:
    workdir_lib.read_config(options.workdir)
    files = workdir_lib.Files(options.workdir)
    rows = metrics.read_rows(options.workdir)
    if not rows:
      raise UserError(
        f'workdir {options.workdir!r} holds no metrics yet: wait for the first '
        'line of its run.'
      )
  except UserError as error:
    print(error, file=sys.stderr)
    return 1
  workdir_lib.fetch(options.workdir, files.folder / run_pictures.PASS)
  for path in run_pictures.draw(
    files.folder, rows, files.folder / workdir_lib.PLOTS
  ):
    print(f'{options.workdir}/{workdir_lib.PLOTS}/{path.name}')
  files.sync()
  return 0


if __name__ == '__main__':
  sys.exit(main())
