# SPDX-License-Identifier: Apache-2.0
"""Finds pictures by a text, or captions by a picture: jaxsparse retrieve.

The best go to stdout, and their pictures to a contact sheet. With a matching
head a second number is what the best few captions are in order by.
"""

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Sequence

import numpy as np

from jaxsparse.analysis import contact_sheet
from jaxsparse.config import Config, DataConfig
from jaxsparse.config.errors import UserError, require
from jaxsparse.data import unknown_words
from jaxsparse.data.corpus import build_corpus, whole_collection
from jaxsparse.data.pictures import stored
from jaxsparse.data.pictures.decode import read_picture
from jaxsparse.data.pieces import Corpus
from jaxsparse.data.tokenizer import load_from_workdir
from jaxsparse.inference import picture_search
from jaxsparse.inference.picture_search import Found, PictureSearch
from jaxsparse.run import checkpoint, run_config, trained
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.command_line import Once, Parser

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
  add('--text', action=Once, default='', help='what a picture should show')
  add(
    '--image',
    action=Once,
    default='',
    metavar='FILE',
    help='a picture to be described',
  )
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
    help='of what was trained on, all pairs or those held out',
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
  folder = _folder(arguments.out, workdir)
  size = config.multimodal.vision.image_size
  wanted = None
  if arguments.image:
    wanted = read_picture(workdir_lib.expanded(arguments.image), size)
  tokenizer = load_from_workdir(workdir, config.model.vocab_size)
  if arguments.text:
    picture_search.require_room(config, tokenizer, arguments.text, '--text')
    unknown_words.tell(tokenizer, arguments.text, '--text', _say)
  step = trained.step_of(workdir, arguments.step)
  corpus, learned = _collection(arguments, config, workdir)
  _, params = checkpoint.load_params(workdir, step, _say)
  pairs = [*corpus.train, *corpus.validation, *(corpus.test or ())]
  if arguments.among == 'held_out':
    pairs = [pair for pair in pairs if pair.number not in (learned or ())]
  read = stored.reader(corpus, size, _say)
  search = PictureSearch(config, params, tokenizer, pairs, read, _say)
  if wanted is None:
    found = search.by_text(arguments.text, arguments.number)
  else:
    found = search.by_picture(wanted, arguments.number)
  for place, one in enumerate(found, 1):
    print(f'{place:3}  {_line(one, learned)}')
  with workdir_lib.write_errors(folder, '--out'):
    best = found[: contact_sheet.MOST]
    _draw_sheet(folder / SHEET, best, read, wanted, arguments.text)
    shown = ''
    if len(found) > contact_sheet.MOST:
      shown = f' (the best {contact_sheet.MOST:,} of these {len(found):,})'
    print(f'Pictures: {folder / SHEET}{shown}')
    if arguments.attention:
      _draw_attention(
        folder / ATTENTION, search, arguments.text, found, read, wanted
      )
      print(f'Attention: {folder / ATTENTION}')


def _config(arguments: argparse.Namespace, workdir: str) -> Config:
  """Of the run.

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
  return config


def _folder(out: str, workdir: str) -> pathlib.Path:
  """Where pictures go.

  Raises:
    UserError: nothing can be written there.
  """
  given = workdir_lib.expanded(out)
  folder = pathlib.Path(given or pathlib.Path(workdir) / workdir_lib.PLOTS)
  workdir_lib.make_folder(folder, '--out')
  with workdir_lib.write_errors(folder, '--out'):
    tempfile.TemporaryFile(dir=folder).close()
  return folder


def _collection(
  arguments: argparse.Namespace, config: Config, workdir: str
) -> tuple[Corpus, set[int] | None]:
  """What is searched, and the numbers of the pairs that training saw.

  They are None of other pairs than the run's, of which nobody knows.

  Raises:
    UserError: the pairs can't be read, are of videos, or are not split.
  """
  assert config.multimodal is not None
  learned = None
  if arguments.pairs:
    corpus = whole_collection(
      _elsewhere(config.data, arguments.pairs), '--pairs', _say
    )
  else:
    corpus = build_corpus(config.data, _say)
    record = checkpoint.read_record(workdir) or {}
    # Pairs may have come to the same folder since.
    if record.get('data', {}).get('corpus') == corpus.key:
      learned = {pair.number for pair in corpus.train}
  require(
    learned is not None or arguments.among == 'all',
    '--among=held_out is of the pairs that this run was trained on, and '
    f'{arguments.pairs or config.data.pairs!r} holds others: leave it out.',
  )
  found = stored.num_frames(corpus, config.multimodal.vision.image_size)
  require(
    found == 1,
    f'--pairs must hold pictures, as this model has multimodal.num_frames = 1; '
    f'those of {arguments.pairs or config.data.pairs!r} are videos of {found} '
    'frames.',
  )
  return corpus, learned


def _elsewhere(data: DataConfig, pairs: str) -> DataConfig:
  """Names other pairs, all of them: what a run leaves out is its own matter."""
  kept = {}
  if pairs.startswith('tfds:') and data.pairs.startswith('tfds:'):
    names = 'image_feature', 'tfds_feature'
    kept = {name: getattr(data, name) for name in names}
  return DataConfig(pairs=pairs, cache_dir=data.cache_dir, **kept)


def _line(one: Found, learned: set[int] | None) -> str:
  """A pair's scores and caption, and whether it was trained on, if known."""
  match = '' if one.match is None else f'  {one.match:.2f}'
  seen = ''
  if learned is not None:
    seen = f'  ({"trained on" if one.pair.number in learned else "held out"})'
  return f'{one.score:.3f}{match}  {one.pair.captions[0]}{seen}'


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
  said = text or best.captions[0]
  looks = search.attention(said, picture)[: contact_sheet.MOST]
  contact_sheet.draw(
    path,
    [picture, *(contact_sheet.looked_at(picture, w) for _, w in looks)],
    ['', *(name.strip() or '(begin)' for name, _ in looks)],
    heading=said,
  )


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
