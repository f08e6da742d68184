# SPDX-License-Identifier: Apache-2.0
"""`jaxsparse generate --image=FILE`: what a picture shows."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence

from jaxsparse.config import Config
from jaxsparse.config.errors import UserError, require
from jaxsparse.data import unknown_words
from jaxsparse.data.pictures.decode import read_picture
from jaxsparse.data.tokenizer import Tokenizer, load_from_workdir
from jaxsparse.inference import batch, sight
from jaxsparse.inference.text import Request, encode_prompt
from jaxsparse.run import trained
from jaxsparse.run import workdir as workdir_lib

# Flags of language models, which a caption does not have.
_OTHERS = (
  *('prompt_file', 'adapter', 'quantize', 'kv', 'tables', 'row_cache'),
  'history_blocks',
)


def write_captions(
  config: Config,
  arguments: argparse.Namespace,
  requests: Sequence[Request],
  write: Callable[[str], None],
  say: Callable[[str], None],
) -> None:
  """Writes a caption for each request.

  Args:
    config: of the workdir.
    arguments: of generate.
    requests: what each caption begins with, and how it is drawn.
    write: gets the texts.
    say: gets sentences on the way.

  Raises:
    UserError: the model reads no pictures, has learned no captions or reads
      several pictures at once, the picture can't be read, a prompt leaves no
      room, or a flag is of language models alone.
  """
  folder = arguments.workdir
  if config.multimodal is None:
    raise UserError(
      f'--image is for a model of pictures, and workdir {folder!r} holds one '
      'of text: leave it out, or give another workdir.'
    )
  for name in _OTHERS:
    value = getattr(arguments, name)
    if value:
      raise UserError(
        f'--{name} is of language models and does nothing with --image, got '
        f'{value!r}: leave it out.'
      )
  settings = sight.require_captions(config)
  size = settings.vision.image_size
  picture = read_picture(workdir_lib.expanded(arguments.image), size)
  tokenizer = load_from_workdir(folder, config.model.vocab_size)
  for prompt in arguments.prompt:
    unknown_words.tell(tokenizer, prompt, '--prompt', say)
  requests = [_fitting(config, tokenizer, request) for request in requests]
  model = config.model.with_vocabulary(tokenizer.vocab_size)
  step = trained.step_of(folder, arguments.step)
  _, params, found = sight.load(folder, settings, model, step, say)
  programs = batch.prepare(
    model, params, tokenizer, requests, config.data.seq_len, found
  )
  texts = batch.complete_all(programs, tokenizer, requests, picture=picture)
  for request, done in zip(requests, texts, strict=True):
    write(f'{request.prompt}{done.text}\n')


def _fitting(config: Config, tokenizer: Tokenizer, request: Request) -> Request:
  """The request with no more tokens than a row of training has."""
  length = config.data.seq_len
  given = len(encode_prompt(tokenizer, request.prompt))
  require(
    given <= length,
    f'prompt must have fewer than data.seq_len = {length} tokens of this '
    f'model, got {given - 1}.',
  )
  # The last one that is drawn is in no row.
  most = min(request.max_tokens, length - given + 1)
  return dataclasses.replace(request, max_tokens=most)
