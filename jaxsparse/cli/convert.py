# SPDX-License-Identifier: Apache-2.0
"""Models in, out, and into others: `jaxsparse convert from-hf` and so on."""

from jaxsparse.cli.command import imported
from jaxsparse.config.errors import UserError, did_you_mean, shown

# Each with its module and what it does.
DIRECTIONS = {
  'from-hf': (
    'convert_from_hf',
    'a published checkpoint becomes a workdir, which all commands read',
  ),
  'to-hf': (
    'convert_to_hf',
    "a workdir becomes a folder that Hugging Face's transformers loads",
  ),
  'from-peft': (
    'convert_from_peft',
    'an adapter of peft becomes one that stands beside a workdir',
  ),
  'to-peft': (
    'convert_to_peft',
    'an adapter becomes one that peft loads',
  ),
  'add-memory': (
    'convert_add_memory',
    'a trained model gets memory layers, experts or composed heads',
  ),
  'emoji': (
    'convert_emoji',
    "a font's emoji and their names become pairs to learn from",
  ),
}


def main(arguments: list[str]) -> None:
  """Runs the direction that the arguments begin with.

  Raises:
    UserError: there is no such direction, or one of its flags is wrong.
  """
  if not arguments or arguments[0] in ('-h', '--help'):
    print(_page())
    return
  name, *rest = arguments
  if name not in DIRECTIONS:
    raise UserError(
      f'there is no direction {shown(name)}{did_you_mean(name, DIRECTIONS)}; '
      f'there are {", ".join(DIRECTIONS)}.'
    )
  module, _ = DIRECTIONS[name]
  imported('convert', f'cli.{module}').main(rest)


def _page() -> str:
  lines = ['usage: jaxsparse convert DIRECTION ...', '']
  lines += [f'  {name:<12}{what}' for name, (_, what) in DIRECTIONS.items()]
  return '\n'.join(
    [*lines, '', '`jaxsparse convert DIRECTION --help` says more.']
  )
