# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints in: `jaxsparse convert from-hf FOLDER --workdir=W`."""

import argparse
import pathlib

from jaxsparse.config.errors import require
from jaxsparse.interop import (
  bytedance,
  config_json,
  gguf_file,
  hugging_face,
  importing,
  maxtext,
  own_format,
)
from jaxsparse.interop.importing import Opened
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.command_line import Parser
from jaxsparse.run.progress import Reporter


def main(arguments: list[str]) -> None:
  """Makes a workdir, and says what it is and what to do with it.

  Raises:
    UserError: a flag is wrong, or the checkpoint is damaged or of a model that
      we do not have.
  """
  parser = Parser(
    prog='jaxsparse convert from-hf',
    description='Make a workdir of a published checkpoint.',
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument(
    'path',
    help='a folder with config.json and model.safetensors, a .gguf file, or a '
    "run of MaxText's DCFormer or of UltraMem's trainer",
  )
  parser.add_argument(
    '--workdir',
    required=True,
    default=argparse.SUPPRESS,
    help='the folder to make, new or empty',
  )
  parser.add_argument(
    '--dtype',
    default='float32',
    choices=('float32', 'bfloat16', 'float16'),
    help='of the activations; parameters are kept in float32',
  )
  options = parser.parse_args(arguments)
  workdir = workdir_lib.expanded(options.workdir)
  reporter = Reporter()
  opened = open_path(pathlib.Path(workdir_lib.expanded(options.path)))
  model = opened.config
  reporter.say(
    f'{opened.family}: {model.num_layers} blocks, width {model.model_dim}, '
    f'{model.num_heads} heads, vocabulary {model.vocab_size:,}, sequences of '
    f'{opened.length:,} tokens.'
  )
  size = importing.import_model(opened, workdir, options.dtype, reporter)
  reporter.say(_summary(size, workdir))


def _summary(size: int, workdir: str) -> str:
  begin = f'{size:,} parameters are in {workdir}.'
  if not workdir_lib.has_tokenizer(workdir):
    names = workdir_lib.TOKENIZERS
    return (
      f'{begin} Put its {" or ".join(names)} there, too: without one no '
      f'command reads text. In Python\n  jaxsparse.load({workdir!r})'
    )
  return (
    f'{begin} Go on with\n'
    f'  jaxsparse generate --workdir={workdir} --prompt=...\n'
    f'  jaxsparse serve --model-path={workdir}\n'
    f'  jaxsparse train --workdir={workdir} --config.data.text=...'
  )


def open_path(path: pathlib.Path) -> Opened:
  """Finds out what a path holds, and reads what it says of itself.

  Raises:
    UserError: it is nothing that can be imported.
  """
  require(
    path.exists(),
    f'there is no folder or file {str(path)!r}: fetch a model of the Hugging '
    'Face hub first, by hf download NAME --local-dir=FOLDER.',
  )
  if path.suffix == '.gguf' and path.is_file():
    return gguf_file.open_file(path)
  require(path.is_dir(), f'{str(path)!r} must be a folder, but is a file.')
  if (path / bytedance.CONFIG).is_file():
    return bytedance.open_folder(path)
  if state := maxtext.find(path):
    return maxtext.open_folder(path, state)
  content = config_json.read(path)
  if own_format.is_own(content):
    return own_format.open_folder(path, content)
  return hugging_face.open_folder(path, content)
