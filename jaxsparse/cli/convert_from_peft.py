# SPDX-License-Identifier: Apache-2.0
"""Adapters in: `jaxsparse convert from-peft FOLDER --workdir=W --out=A`."""

import argparse
import pathlib

from jaxsparse.cli.convert_to_peft import layout_of
from jaxsparse.interop import peft
from jaxsparse.run import (
  adapter_files,
  new_workdir,
  run_config,
  start,
  trained,
)
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.command_line import Parser


def main(arguments: list[str]) -> None:
  """Makes an adapter beside the model of a workdir, and says how to use it.

  Raises:
    UserError: a flag is wrong, or the adapter is damaged or for another model.
  """
  parser = Parser(
    prog='jaxsparse convert from-peft',
    description='Make an adapter of one that peft wrote.',
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument('folder', help='as peft wrote it')
  required = dict(required=True, default=argparse.SUPPRESS)
  parser.add_argument(
    '--workdir', help='of the model that it is for', **required
  )
  parser.add_argument('--out', help='folder of the new adapter', **required)
  parser.add_argument(
    '--step',
    type=trained.to_step,
    help='checkpoint that it is for, or "best"; %(default)s: the newest',
  )
  options = parser.parse_args(arguments)
  workdir = workdir_lib.expanded(options.workdir)
  out = workdir_lib.expanded(options.out)
  folder = pathlib.Path(workdir_lib.expanded(options.folder))
  config = run_config.read(workdir)
  settings, tensors = peft.read(folder, layout_of(config))
  named = workdir if options.step is None else f'{workdir}@{options.step}'
  base = start.checkpoint_of(named, '--workdir')
  new_workdir.require_new(out, '--out')
  meta = dict(
    kind=settings.kind, base=base.fingerprint, base_step=base.step, steps=0,
    text='', **settings.to_json(),
  )  # fmt: skip
  adapter_files.write(out, tensors, meta)
  print(
    f'{out} holds the adapter of {peft.num_matrices(tensors)} matrices, of '
    f'rank {settings.rank}. Use it with\n'
    f'  jaxsparse generate --workdir={workdir} --adapter={out} --prompt=...'
  )
