# SPDX-License-Identifier: Apache-2.0
"""Finds pictures by a text, or captions by a picture: jaxsparse retrieve.

The best go to stdout, and their pictures to a contact sheet. With a matching
head a second number is what the best few captions are in order by.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from jaxsparse import config as config_lib
from jaxsparse.analysis import contact_sheet
from jaxsparse.config import Config
from jaxsparse.config.errors import UserError, require
from jaxsparse.data.corpus import build_corpus
from jaxsparse.data.pictures import stored
from jaxsparse.data.pictures.decode import read_picture
from jaxsparse.data.tokenizer import load_from_workdir
from jaxsparse.inference.picture_search import Found, PictureSearch
from jaxsparse.run import checkpoint, run_config, trained
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.command_line import Parser

SHEET, ATTENTION = 'retrieved.png', 'attention_to_patches.png'


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
  parser = Parser(
    prog='jaxsparse retrieve',
    description='Find pictures by a text, or captions by a picture, with a '
    'model that was trained on pairs of them.',
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
  )
  add = parser.add_argument
  add(
    '--workdir',
    required=True,
    default=argparse.SUPPRESS,
    help='folder of the training run',
  )
  add('--text', default='', help='what a picture should show')
  add('--image', default='', metavar='FILE', help='a picture to be described')
  add(
    '--pairs',
    default='',
    help='what is searched, as data.pairs has it; %(default)s: what was '
    'trained on',
  )
  add(
    '--among',
    choices=('all', 'held_out'),
    default='all',
    help='all pairs, or those that training did not see',
  )
  add('--number', type=int, default=12, help='the best that are shown')
  add(
    '--step',
    type=trained.to_step,
    help='checkpoint to read, or "best"; %(default)s: the newest',
  )
  add(
    '--out',
    default='',
    metavar='FOLDER',
    help='where pictures go; %(default)s: plots/ in the workdir',
  )
  add(
    '--attention',
    action='store_true',
    help=f'draw what each word reads of the best picture, {ATTENTION}',
  )
  arguments = parser.parse_args(argv)
  require(
    bool(arguments.text.strip()) != bool(arguments.image),
    'give --text or --image, one of them.',
  )
  require(
    arguments.number > 0, f'number must be positive, got {arguments.number}.'
  )
  return arguments


def main(argv: Sequence[str]) -> None:
  arguments = parse_arguments(argv)
  workdir = workdir_lib.expanded(arguments.workdir)
  config = _config(arguments, workdir)
  assert config.multimodal is not None
  # Before minutes of encoding.
  size = config.multimodal.vision.image_size
  wanted = None
  if arguments.image:
    wanted = read_picture(workdir_lib.expanded(arguments.image), size)
  tokenizer = load_from_workdir(workdir, config.model.vocab_size)
  _, params = checkpoint.load_params(
    workdir, trained.step_of(workdir, arguments.step), _say
  )
  corpus = build_corpus(config.data, _say)
  pairs = [*corpus.validation]
  if arguments.among == 'all':
    pairs = [*corpus.train, *pairs, *(corpus.test or ())]
  read = stored.reader(corpus, size, _say)
  search = PictureSearch(config, params, tokenizer, pairs, read, _say)
  if wanted is None:
    found = search.by_text(arguments.text, arguments.number)
  else:
    found = search.by_picture(wanted, arguments.number)
  held_out = {pair.number for pair in corpus.validation}
  for place, one in enumerate(found, 1):
    seen = 'held out' if one.pair.number in held_out else 'trained on'
    match = '' if one.match is None else f'  {one.match:.2f}'
    print(
      f'{place:3}  {one.score:.3f}{match}  {one.pair.captions[0]}  ({seen})'
    )
  folder = pathlib.Path(workdir_lib.expanded(arguments.out) or workdir)
  folder = folder if arguments.out else folder / workdir_lib.PLOTS
  with workdir_lib.write_errors(folder):
    _draw_sheet(folder / SHEET, found, read, wanted, arguments.text)
    print(f'Pictures: {folder / SHEET}')
    if arguments.attention:
      _draw_attention(
        folder / ATTENTION, search, arguments.text, found, read, wanted
      )
      print(f'Attention: {folder / ATTENTION}')


def _config(arguments: argparse.Namespace, workdir: str) -> Config:
  """Of the run, with what is to be searched.

  Raises:
    UserError: the run has no pictures, or no such attention.
  """
  config = run_config.read(workdir, _say, may_see=True)
  if config.multimodal is None:
    raise UserError(
      f'workdir {workdir!r} holds a model of text alone: give one of a run on '
      'data.pairs.'
    )
  if config.multimodal.num_frames > 1:
    raise UserError(
      f'workdir {workdir!r} holds a model of frames, which are no pictures to '
      'be found: give one with multimodal.num_frames = 1.'
    )
  require(
    not arguments.attention or config.multimodal.fusion_type == 'co_attention',
    '--attention shows what a text reads of a picture, which needs '
    "multimodal.fusion_type = 'co_attention'; this run has "
    f'{config.multimodal.fusion_type!r}.',
  )
  if not arguments.pairs:
    return config
  data = dataclasses.replace(config.data, pairs=arguments.pairs)
  return config_lib.validated(dataclasses.replace(config, data=data))


def _draw_sheet(
  path: pathlib.Path,
  found: Sequence[Found],
  read: stored.Read,
  wanted: np.ndarray | None,
  text: str,
) -> None:
  pictures = [read(one.pair.number) for one in found]
  titles = [f'{one.score:.2f} {one.pair.captions[0]}' for one in found]
  if wanted is not None:
    pictures, titles = [wanted, *pictures], ['asked for', *titles]
  heading = f'asked for: {text}' if text else ''
  contact_sheet.draw(path, pictures, titles, heading=heading)


def _draw_attention(
  path: pathlib.Path,
  search: PictureSearch,
  text: str,
  found: Sequence[Found],
  read: stored.Read,
  wanted: np.ndarray | None,
) -> None:
  best = found[0].pair
  picture = read(best.number) if wanted is None else wanted
  looks = search.attention(text or best.captions[0], picture)
  contact_sheet.draw(
    path,
    [picture, *(contact_sheet.looked_at(picture, w) for _, w in looks)],
    [text or best.captions[0], *(name or '(begin)' for name, _ in looks)],
  )


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
