# SPDX-License-Identifier: Apache-2.0
"""Emoji as pairs of pictures and captions: jaxsparse convert emoji."""

import argparse
import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from jaxsparse.config.errors import UserError
from jaxsparse.data.pictures import emoji
from jaxsparse.run import workdir as workdir_lib
from jaxsparse.run.command_line import Parser

_EPILOG = """
On Debian and Ubuntu three packages have these files, and need not be
installed (apt-get download NAME; dpkg -x FILE DIRECTORY):

  fonts-noto-color-emoji  usr/share/fonts/truetype/noto/NotoColorEmoji.ttf
  unicode-data            usr/share/unicode/emoji/emoji-test.txt
  unicode-cldr-core       usr/share/unicode/cldr/common/annotations/en.xml
                          usr/share/unicode/cldr/common/annotationsDerived/en.xml

Their own licences hold for what is written: the SIL Open Font License for the
pictures, Unicode's for the texts.
"""


def main(arguments: list[str]) -> None:
  """Writes the pairs to a new folder.

  Raises:
    UserError: a flag is wrong, a file can't be read, or the folder can't be
      written.
  """
  options = parse_arguments(arguments)
  font = emoji.Font(options.font)
  names = emoji.names(options.names)
  said = [emoji.annotations(path) for path in options.annotations]
  with _new_folder(options.out) as folder:
    num_more, missing = emoji.write(folder, font, names, said)
  number = len(names) - len(missing)
  lacks = ''
  if missing:
    first = missing[0]
    lacks = f' The font lacks {len(missing):,}, such as {first.name!r}.'
  print(
    f'{options.out}: {number:,} pairs of {len(names):,} emoji, {num_more:,} '
    f'with further captions.{lacks} Train on them by --config.data.pairs='
    f'{options.out}.'
  )


@contextlib.contextmanager
def _new_folder(name: str) -> Iterator[pathlib.Path]:
  """A folder that gets its name when all has been written to it."""
  folder = workdir_lib.empty_folder(name)
  partial = folder.with_name(f'{folder.name}.{os.getpid()}')
  try:
    partial.mkdir(parents=True)
    yield partial
    partial.replace(folder)
  except OSError as error:
    raise UserError(
      f"--out={name} can't be written ({error.strerror}): name another folder, "
      'or make room.'
    ) from error
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
  parser = Parser(
    prog='jaxsparse convert emoji',
    description="Write a colour font's emoji as pictures with their names.",
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add: Any = parser.add_argument
  add('--font', required=True, type=_path, help='with bitmaps: NotoColorEmoji')
  add('--names', required=True, type=_path, help="Unicode's emoji-test.txt")
  add(
    '--annotations',
    default=[],
    type=lambda text: [_path(part) for part in text.split(',')],
    help="further captions: files of CLDR's annotations, separated by commas; "
    'those of any language',
  )
  add('--out', required=True, help='a new folder')
  return parser.parse_args(arguments)


def _path(text: str) -> pathlib.Path:
  return pathlib.Path(workdir_lib.expanded(text))
