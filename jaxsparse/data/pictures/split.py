# SPDX-License-Identifier: Apache-2.0
"""A collection of pairs as a corpus: split, and known by its content."""

import dataclasses
import hashlib
import json
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence

from etils import epath

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError, did_you_mean
from jaxsparse.data import builder, text_files
from jaxsparse.data.percent import Percent
from jaxsparse.data.pictures import captions
from jaxsparse.data.pictures.folder import CAPTIONS, Folder
from jaxsparse.data.pictures.four_shapes import FourShapes
from jaxsparse.data.pictures.frames import Frames
from jaxsparse.data.pictures.pair import Pair, Pairs, classes
from jaxsparse.data.pictures.shapes import Shapes
from jaxsparse.data.pictures.tar import Tar
from jaxsparse.data.pieces import Corpus
from jaxsparse.run.workdir import expanded

Say = Callable[[str], None]

GENERATED = dict(shapes=Shapes, four_shapes=FourShapes, frames=Frames)

# Raised when the same pairs would be split in another way.
_FORMAT = 1
# Whole groups may miss the wanted share by this factor.
_MOST_OFF = 1.5


def read(config: DataConfig, corpora: pathlib.Path, say: Say = print) -> Corpus:
  """The pairs of data.pairs.

  Pairs that are right for each other, as equal pictures are, lie in one split.
  Which one hangs on their names, or on their group, alone.

  Args:
    config: names the pairs and what is held out.
    corpora: the folder of built corpora.
    say: gets lines on what takes long, and on equal pairs.

  Raises:
    UserError: pairs can't be read, or are too few.
  """
  collection = find(config, say)
  pairs = [
    pair
    for pair in collection.pairs
    if not config.without or config.without not in pair.captions[0]
  ]
  if not pairs:
    raise UserError(
      f'data.without = {config.without!r} is in every first caption: take '
      'words that fewer pairs have.'
    )
  if config.without and len(pairs) == len(collection.pairs):
    say(f'data.without = {config.without!r} is in no first caption.')
  digests = _digests(collection, pairs, say)
  items = classes([
    [('picture', digest), ('meaning', pair.meaning or pair.captions[0])]
    for pair, digest in zip(pairs, digests, strict=True)
  ])  # fmt: skip
  pairs = [
    dataclasses.replace(pair, item=item)
    for pair, item in zip(pairs, items, strict=True)
  ]
  splits = _split(pairs, config)
  shares = [config.validation_fraction, config.test_fraction, config.held_out]
  content = [
    [digest, pair.name, pair.captions, pair.group, pair.prompt, pair.split]
    + _more(pair) * (not config.pairs.startswith('generated:'))
    for pair, digest in zip(pairs, digests, strict=True)
  ]
  identity = json.dumps(['pairs', _FORMAT, *shares, content])
  key = hashlib.sha256(identity.encode()).hexdigest()[:24]
  directory = _made(corpora / key)
  _tell(splits, items, say)
  return Corpus(
    key=key,
    directory=directory,
    train=splits['train'],
    validation=splits['validation'],
    test=splits['test'] or None,
    validation_bytes=sum(
      len(pair.captions[0].encode()) for pair in splits['validation']
    ),
    pictures=collection,
  )


def whole(
  config: DataConfig, corpora: pathlib.Path, say: Say = print
) -> Corpus:
  """All pairs of data.pairs as one split, to be searched and not learned.

  Args:
    config: names the pairs.
    corpora: the folder of built corpora.
    say: gets lines on what takes long.

  Raises:
    UserError: pairs can't be read.
  """
  collection = find(config, say)
  digests = _digests(collection, collection.pairs, say)
  identity = f'whole {_FORMAT}{"".join(digests)}'
  key = hashlib.sha256(identity.encode()).hexdigest()[:24]
  return Corpus(
    key=key,
    directory=_made(corpora / key),
    train=collection.pairs,
    validation=[],
    test=None,
    validation_bytes=0,
    pictures=collection,
  )


def _digests(collection: Pairs, pairs: Sequence[Pair], say: Say) -> list[str]:
  percent = Percent('Hashing the pictures', len(pairs), say)
  digests = []
  for pair in pairs:
    percent.reach(len(digests))
    digests.append(collection.digest(pair.number))
  return digests


def _made(directory: pathlib.Path) -> pathlib.Path:
  with builder.user_errors(directory):
    directory.mkdir(parents=True, exist_ok=True)
  return directory


def _more(pair: Pair) -> list:
  """What a key is of besides, where a pair has it.

  Of generated ones the digest says all. Without such a pair the key is what it
  was before these were in it, so that runs of former versions go on.
  """
  some = [pair.distractors, pair.meaning]
  return some if any(some) else []


def find(config: DataConfig, say: Say = print) -> Pairs:
  """The collection that data.pairs names.

  Raises:
    UserError: there is none, or it can't be read.
  """
  where = config.pairs
  kind, _, name = where.partition(':')
  if kind == 'tfds':
    # It takes seconds to import.
    from jaxsparse.data.pictures.from_tfds import FromTFDS

    return FromTFDS(name, config, say)
  if kind == 'generated':
    if name not in GENERATED:
      raise UserError(
        f'data.pairs = {where!r} is not generated here'
        f'{did_you_mean(name, GENERATED)}: there are '
        f'{", ".join(f"generated:{known}" for known in GENERATED)}.'
      )
    return GENERATED[name]()
  if '://' not in where:
    return _in_files(epath.Path(expanded(where)), where, say)
  with text_files.reaching(where):
    # Of several none is a folder with captions.
    path = None if ',' in where else text_files.remote_path(where)
    return _in_files(path, where, say)


def _in_files(path: epath.Path | None, where: str, say: Say) -> Pairs:
  try:
    if path is not None and (path / CAPTIONS).exists():
      return Folder(path)
    is_folder = path is not None and path.is_dir()
    archives = text_files.find(str(path / '*.tar') if is_folder else where)
  # Such as one that is no path at all.
  except (OSError, ValueError) as error:
    if isinstance(error, UserError) and 'names no file' not in str(error):
      raise
    raise captions.not_found(where) from error
  return Tar(archives, say)


def _split(pairs: list[Pair], config: DataConfig) -> dict[str, list[Pair]]:
  if any(pair.split for pair in pairs):
    names = ('train', 'validation', 'test')
    return {n: [pair for pair in pairs if pair.split == n] for n in names}
  by_group = config.held_out == 'group'
  if by_group and not all(pair.group for pair in pairs):
    lacks = next(pair.name for pair in pairs if not pair.group)
    raise UserError(
      f"data.held_out = 'group' needs the group of every pair, and {lacks!r} "
      "has none: give groups, or data.held_out='random'."
    )
  units = classes([
    [('item', pair.item)] + [('group', pair.group)] * by_group for pair in pairs
  ])  # fmt: skip
  sizes = Counter(units)
  names: dict[int, str] = {}
  for unit, pair in zip(units, pairs, strict=True):
    name = pair.group if by_group else pair.name
    names[unit] = min(names.get(unit, name), name)
  rest = sorted(
    sizes, key=lambda unit: hashlib.sha256(names[unit].encode()).hexdigest()
  )
  split_of = {}
  for split in ('validation', 'test'):
    share = getattr(config, f'{split}_fraction')
    chosen = _draw(rest, sizes, share * len(pairs))
    split_of |= dict.fromkeys(chosen, split)
    rest = [unit for unit in rest if unit not in chosen]
  splits = {name: [] for name in ('train', 'validation', 'test')}
  for unit, pair in zip(units, pairs, strict=True):
    splits[split_of.get(unit, 'train')].append(pair)
  if not (splits['train'] and splits['validation']):
    what = 'groups' if by_group else 'different pairs'
    raise UserError(
      f'data.pairs = {config.pairs!r} has {len(sizes)} {what}, too few to '
      'train and to validate: give more.'
    )
  return splits


def _draw(order: list[int], sizes: Counter, wanted: float) -> set[int]:
  """Units in order whose pairs are about `wanted`; never all of them."""
  drawn, total = set(), 0
  for unit in order:
    # One large group must not become half of what is held out.
    if total < wanted and total + sizes[unit] <= max(_MOST_OFF * wanted, 1):
      drawn.add(unit)
      total += sizes[unit]
  if not drawn and wanted and len(order) > 1:
    drawn.add(min(order, key=lambda unit: sizes[unit]))
  return drawn if len(drawn) < len(order) else set()


def _tell(splits: dict[str, list[Pair]], items: list[int], say: Say) -> None:
  parts = [f'{len(splits[name]):,} to {verb}' for name, verb in (
    ('train', 'train'), ('validation', 'validate'), ('test', 'test')
  ) if splits[name]]  # fmt: skip
  equal = len(items) - len(set(items))
  say(
    f'{len(items):,} pairs: {", ".join(parts)}'
    + (
      f'; {equal:,} share picture or meaning with another and count as right '
      'for it.'
      if equal
      else '.'
    )
  )
