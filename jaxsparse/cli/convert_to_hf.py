# SPDX-License-Identifier: Apache-2.0
"""Models out: `jaxsparse convert to-hf --workdir=W FOLDER`."""

import argparse
import dataclasses
from typing import Any

import jax

from jaxsparse.config.errors import require
from jaxsparse.data import tokenizer as tokenizer_lib
from jaxsparse.inference import adapters
from jaxsparse.inference.quantize import dequantized
from jaxsparse.interop import exporting, our_leaves, tokenizers_in
from jaxsparse.run import run_config, stored, trained
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.command_line import Parser
from jaxsparse.run.progress import Reporter


def main(arguments: list[str]) -> None:
  """Writes the folder, and says what loads it.

  Raises:
    UserError: a flag or the workdir is wrong, or the folder can't be written.
  """
  parser = Parser(
    prog='jaxsparse convert to-hf',
    description="Make a folder that Hugging Face's transformers loads.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  parser.add_argument('folder', help='the folder to make, new or empty')
  parser.add_argument(
    '--workdir',
    required=True,
    default=argparse.SUPPRESS,
    help='of a training run or an import',
  )
  parser.add_argument(
    '--step',
    type=trained.to_step,
    help='checkpoint to read, or "best": the one of the lowest validation '
    'loss; %(default)s: the newest',
  )
  parser.add_argument(
    '--dtype',
    default='float32',
    choices=('float32', 'bfloat16', 'float16'),
    help='of the tensors',
  )
  adapters.add_flags(parser)
  options = parser.parse_args(arguments)
  workdir = workdir_lib.expanded(options.workdir)
  folder = workdir_lib.empty_folder(options.folder)
  reporter = Reporter()
  config = run_config.read(workdir, reporter.say)
  tokenizer = _tokenizer(workdir, config.model.vocab_size)
  if not config.model.vocab_size:
    require(
      tokenizer is not None,
      f'model.vocab_size in workdir {workdir!r} is the size of its tokenizer, '
      'but it holds no tokenizer.',
    )
    model = config.model.with_vocabulary(tokenizer.vocab_size)
    config = dataclasses.replace(config, model=model)
  form = exporting.form_of(config, _special_ids(tokenizer), options.dtype)
  devices = our_leaves.mesh_for(config.model)
  abstract = our_leaves.nested(our_leaves.abstract(config.model, devices))
  step = trained.step_of(workdir, options.step)
  with jax.set_mesh(devices):
    step, params = adapters.load_params(workdir, step, reporter.say, abstract)
    base = stored.params_fingerprint(workdir, step)
    params = adapters.applied(
      config.model, params, options.adapter, base, options.force
    )
    params = dequantized(params)
    exporting.write(params, form, folder, options.dtype, reporter)
  reporter.say(tokenizers_in.write_tokenizer(workdir, folder))
  reporter.say(_summary(form, step, str(folder)))


def _tokenizer(workdir: str, vocab_size: int) -> tokenizer_lib.Tokenizer | None:
  """None where the workdir has none."""
  if not workdir_lib.has_tokenizer(workdir):
    return None
  return tokenizer_lib.load_from_workdir(workdir, vocab_size)


def _special_ids(tokenizer: tokenizer_lib.Tokenizer | None) -> dict[str, Any]:
  """What a config.json says of them; other defaults than null are wrong."""
  if tokenizer is None:
    return dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
  # One number where one is all, as everybody reads that.
  ends = sorted({tokenizer.boundary_id, *tokenizer.stop_ids})
  return dict(
    bos_token_id=tokenizer.begin_id,
    eos_token_id=ends if len(ends) > 1 else ends[0],
    pad_token_id=None,
  )


def _summary(form: exporting.Form, step: int, folder: str) -> str:
  begin = f'The checkpoint of step {step} is in {folder}'
  if form.name:
    return (
      f'{begin} as a {form.name}. Load it with\n'
      f'  transformers.AutoModelForCausalLM.from_pretrained({folder!r})'
    )
  return (
    f'{begin} under the names of jaxsparse and with its config.json, as no '
    'class of transformers that is written here has this model. Bring it back '
    f'with\n  jaxsparse convert from-hf {folder} --workdir=...'
  )
