# SPDX-License-Identifier: Apache-2.0
"""Adapters out: `jaxsparse convert to-peft --workdir=W FOLDER`."""

import argparse

from jaxsparse.config import AdapterConfig, Config
from jaxsparse.config.errors import require
from jaxsparse.interop import exporting, peft
from jaxsparse.interop.layout import Layout
from jaxsparse.run import adapter_files, run_config, start
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.command_line import Parser


def main(arguments: list[str]) -> None:
  """Writes the folder, and says what loads it.

  Raises:
    UserError: a flag, the workdir or the adapter is wrong, or the folder can't
      be written.
  """
  parser = Parser(
    prog='jaxsparse convert to-peft',
    description="Write an adapter as peft reads it, for transformers' models.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument('folder', help='the folder to make, new or empty')
  parser.add_argument(
    '--workdir',
    required=True,
    default=argparse.SUPPRESS,
    help='of the run that trained it, or of its base',
  )
  parser.add_argument(
    '--adapter', default='', help='its folder; empty: that of the run'
  )
  parser.add_argument(
    '--force',
    action='store_true',
    help='write an adapter that was trained beside other parameters, too',
  )
  options = parser.parse_args(arguments)
  workdir = workdir_lib.expanded(options.workdir)
  folder = workdir_lib.empty_folder(options.folder)
  config = run_config.read(workdir)
  source = workdir_lib.expanded(options.adapter)
  if not source:
    source = str(adapter_files.folder_of(workdir, config.adapter.name))
  tensors, meta = adapter_files.read(source)
  require(
    meta['kind'] == 'lora',
    f'the adapter in {source!r} is of {meta["kind"]!r}, and peft has those of '
    "'lora' alone.",
  )
  known = start.fingerprints(config, workdir)
  require(
    bool(known),
    f'--workdir must hold a checkpoint of the base, and {workdir!r} has none.',
  )
  base = meta['base'] if meta['base'] in known else known[-1]
  adapter_files.require_base(source, meta, base, options.force)
  settings = AdapterConfig.from_json(meta)
  peft.write(folder, settings, tensors, layout_of(config))
  print(
    f'The adapter of {peft.num_matrices(tensors)} matrices is in {folder}. '
    'Load it beside its base with\n'
    f'  peft.PeftModel.from_pretrained(model, {str(folder)!r})'
  )


def layout_of(config: Config) -> Layout:
  """Where transformers has the leaves of a run's model.

  Raises:
    UserError: it has no such model.
  """
  form = exporting.form_of(config, {}, 'float32')
  require(
    bool(form.name),
    'an adapter of peft is for a model of transformers, which has no class '
    'for this one.',
  )
  return form.layout
