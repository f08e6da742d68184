# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: `python -m jaxsparse report WORKDIR`.

Loss, rates and speed; for memory layers the use of slots and its
divergence from uniform over training; for mixtures the load of the experts.
Works while the run goes on, and after it; where the workdir is for reading
only, with --output=FOLDER.
With --attention="some text" also what the newest checkpoint looks at in that
text: a picture of each layer, rollout, relevance and Grad-CAM++, and
attention.html with all of it.
"""

import contextlib
import pathlib
import sys
import tempfile
from collections.abc import Iterator, Sequence

from jaxsparse.analysis import attention_pictures, run_pictures
from jaxsparse.config import Config
from jaxsparse.config.errors import UserError, require_utf8
from jaxsparse.data import tokenizer as tokenizer_lib
from jaxsparse.inference import adapters, attention_maps
from jaxsparse.inference.text import encode_prompt, read_file
from jaxsparse.nn import block
from jaxsparse.run import metrics, run_config
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.command_line import Parser
from jaxsparse.training import inputs

# Maps grow with the square of the text.
_MOST_TOKENS = 2048


def main(arguments: Sequence[str]) -> None:
  """Draws the pictures and names them.

  Raises:
    UserError: a flag or the workdir is wrong.
  """
  parser = Parser(prog='jaxsparse report')
  parser.add_argument('workdir', help='of a training run, begun or finished')
  parser.add_argument(
    '--attention', metavar='TEXT', help='a text to look at, or @FILE'
  )
  parser.add_argument(
    '--output',
    metavar='FOLDER',
    help='where the pictures go, instead of plots/ in the workdir',
  )
  options = parser.parse_args(arguments)
  options.workdir = workdir_lib.expanded(options.workdir)
  config = run_config.read(
    options.workdir, _say, may_see=options.attention is None
  )
  files = workdir_lib.Files(options.workdir)
  rows = metrics.read_rows(options.workdir)
  if not rows and options.attention is None:
    raise UserError(
      f'workdir {options.workdir!r} holds no metrics yet: wait for the first '
      'line of its run, or begin one by jaxsparse train.'
    )
  own = files.folder / workdir_lib.PLOTS
  output = pathlib.Path(options.output).expanduser() if options.output else own
  with _written_to(output, is_own=output == own):
    drawn = []
    if options.attention is not None:
      drawn = draw_attention(options.workdir, config, options.attention, output)
    workdir_lib.fetch(
      options.workdir, files.folder / run_pictures.VALIDATION_STATS
    )
    placements = block.placements(config.model)
    if rows:
      drawn = [
        *run_pictures.draw(files.folder, rows, output, placements, _say),
        *drawn,
      ]
  shown = options.output or f'{options.workdir}/{workdir_lib.PLOTS}'
  for path in drawn:
    print(f'{shown}/{path.name}')
  if output == own:
    files.sync()


@contextlib.contextmanager
def _written_to(folder: pathlib.Path, is_own: bool) -> Iterator[None]:
  """Makes the folder; says at once, or when it turns out, that it can't be."""
  # By a link a workdir of others could choose what is written to.
  if folder.is_file() or (is_own and folder.is_symlink()):
    raise UserError(
      f'{str(folder)!r} must be a folder, but is a file or a link: move it '
      'away, or give --output=FOLDER.'
    )
  try:
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()
    yield
  except OSError as error:
    raise UserError(
      f"pictures can't be written to {str(folder)!r} ({error.strerror}): give "
      '--output=FOLDER.'
    ) from error


def draw_attention(
  workdir: str, config: Config, text: str, folder: pathlib.Path
) -> list[pathlib.Path]:
  """Draws what the newest checkpoint looks at in a text; returns the files.

  Raises:
    UserError: there is no checkpoint, or the text is missing or too long.
  """
  if text.startswith('@'):
    text = read_file('--attention=@', text[1:])
  require_utf8('--attention', text)
  tokenizer = tokenizer_lib.load_from_workdir(workdir, config.model.vocab_size)
  tokens = encode_prompt(tokenizer, text)
  if not 1 < len(tokens) <= _MOST_TOKENS:
    raise UserError(
      f'--attention must be a text of 1 to {_MOST_TOKENS - 1} tokens, got '
      f'{len(tokens) - 1}.'
    )
  _, params = adapters.load_params(workdir)
  model = inputs.with_vocabulary(config, tokenizer.vocab_size).model
  maps = attention_maps.extract_maps(model, params, tokens)
  texts = [_text(tokenizer, token) for token in tokens.tolist()]
  next_text = _text(tokenizer, maps.next_token)
  workdir_lib.make_folder(folder)
  pictures = [folder / 'attention_tokens.png']
  totals = {
    'Rollout': attention_maps.rollout(maps),
    'Relevance': attention_maps.relevance(maps),
    'Grad-CAM++': attention_maps.grad_cam(maps),
  }
  attention_pictures.draw_tokens(totals, texts, next_text, pictures[0])
  for i, layer in enumerate(maps.layers):
    pictures.append(folder / f'attention_block_{i:02}.png')
    attention_pictures.draw_layer(
      layer,
      f'Block {i}, {layer.kind}',
      texts,
      model.sparse,
      pictures[-1],
    )
  page = folder / attention_pictures.PAGE
  attention_pictures.write_page(
    {
      f'{title} for the next token': attention_pictures.last_row(total)
      for title, total in totals.items()
    },
    texts,
    next_text,
    pictures,
    page,
  )
  return [*pictures, page]


def _say(text: str) -> None:
  print(text, file=sys.stderr)


def _text(tokenizer: tokenizer_lib.Tokenizer, token: int) -> str:
  if token in (tokenizer.begin_id, tokenizer.boundary_id):
    return '\N{END OF PROOF}'
  return tokenizer.decode_bytes([token]).decode('utf-8', 'replace')
