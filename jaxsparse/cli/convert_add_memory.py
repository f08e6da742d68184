# SPDX-License-Identifier: Apache-2.0
"""More parts for a trained model: jaxsparse convert add-memory."""

import argparse
import copy
from typing import Any

import jax

from jaxsparse import config as config_lib
from jaxsparse.analysis import cost
from jaxsparse.config import Config
from jaxsparse.data import tokenizer_roles
from jaxsparse.inference import trained_model
from jaxsparse.inference.quantize import dequantized
from jaxsparse.interop import our_leaves, upcycling
from jaxsparse.nn import added_parts
from jaxsparse.run import new_workdir, overrides, run_config, trained
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.command_line import Parser


def parse_arguments(argv: list[str]) -> argparse.Namespace:
  parser = Parser(
    prog='jaxsparse convert add-memory',
    has_fields=True,
    description='Give a trained model memory layers, experts or composed '
    'heads. It is the same function at first; training goes on from there.',
    epilog='--config.model.memory.FIELD=VALUE sets a field of the new part '
    '(of moe and dcmha likewise); jaxsparse train --help=memory lists them.',
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add: Any = parser.add_argument
  required = dict(required=True, default=argparse.SUPPRESS)
  add('--workdir', help='of the trained model', **required)
  add('--out', help='folder of the new workdir', **required)
  add('--preset', choices=upcycling.PRESETS, default='ultramem', help='to add')
  add(
    '--step',
    type=trained.to_step,
    help='checkpoint to read, or "best"; %(default)s: the newest',
  )
  arguments = parser.parse_args(overrides.split(argv)[1])
  arguments.workdir = workdir_lib.expanded(arguments.workdir)
  arguments.out = workdir_lib.expanded(arguments.out)
  return arguments


def main(argv: list[str]) -> None:
  """Writes the extended model to a new workdir.

  Raises:
    UserError: a flag is wrong, the workdir can't be read, or the model would
      begin as another function.
  """
  arguments = parse_arguments(argv)
  old = run_config.read(arguments.workdir)
  new = extended(old, arguments.preset, argv)
  step = trained.step_of(arguments.workdir, arguments.step)
  new_workdir.require_new(arguments.out, '--out')
  devices = our_leaves.mesh_for(old.model)
  with jax.set_mesh(devices), new_workdir.emptied_on_failure(arguments.out):
    _, params = trained_model.load(arguments.workdir, step)
    params = dequantized(params)
    params = added_parts.extend(old.model, new.model, params)
    tokenizer_roles.copy_tokenizer(arguments.workdir, arguments.out)
    origin = dict(workdir=arguments.workdir, step=step, added=arguments.preset)
    new_workdir.write(arguments.out, new, params, origin)
  before, after = (cost.count_parameters(c.model) for c in (old, new))
  print(
    f'{arguments.out}: {after.total / 1e6:.2f}M parameters, of which '
    f'{after.values / 1e6:.2f}M are values of memory layers; before '
    f'{before.total / 1e6:.2f}M. The function is still the same: go on with '
    f'jaxsparse train --workdir={arguments.out}.'
  )


def extended(old: Config, preset: str, argv: list[str]) -> Config:
  """The config with the preset's part, whose fields flags may set.

  Raises:
    UserError: a field is wrong, or the function would be another.
  """
  new = copy.deepcopy(old)
  new.model = upcycling.with_part(new.model, preset)
  overrides.apply(new, overrides.split(argv)[0])
  new = config_lib.validated(new)
  upcycling.require_same_function(
    old.model, new.model, upcycling.field_of(preset)
  )
  return new
