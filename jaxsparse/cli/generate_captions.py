# SPDX-License-Identifier: Apache-2.0
"""`jaxsparse generate --image=FILE`: what a picture shows."""

import argparse
from collections.abc import Callable, Sequence

from jaxsparse.config import Config
from jaxsparse.config.errors import UserError
from jaxsparse.data.pictures.decode import read_picture
from jaxsparse.data.tokenizer import load_from_workdir
from jaxsparse.inference.captions import Captioner
from jaxsparse.inference.text import Request, encode_prompt, stream_text
from jaxsparse.run import checkpoint, trained
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
    write: gets the text as it comes.
    say: gets sentences on the way.

  Raises:
    UserError: the model reads no pictures, has learned no captions or reads
      several pictures at once, the picture can't be read, or a flag is of
      language models alone.
  """
  settings, folder = config.multimodal, arguments.workdir
  if settings is None:
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
  if settings.num_frames > 1:
    raise UserError(
      f'the model of workdir {folder!r} reads {settings.num_frames} frames at '
      'once, and --image is one picture: give a model of pictures.'
    )
  size = settings.vision.image_size
  picture = read_picture(workdir_lib.expanded(arguments.image), size)
  tokenizer = load_from_workdir(folder, config.model.vocab_size)
  step = trained.step_of(folder, arguments.step)
  _, params = checkpoint.load_params(folder, step, say)
  captioner = Captioner(config, params)
  for request in requests:
    given = encode_prompt(tokenizer, request.prompt)
    tokens = captioner.tokens(
      picture,
      given,
      request.max_tokens,
      request.sampling,
      request.seed,
    )
    write(request.prompt)
    for text in stream_text(tokens, tokenizer, given, request.stop):
      write(text)
    write('\n')
