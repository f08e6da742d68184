# SPDX-License-Identifier: Apache-2.0
"""What a guide adds, from its own blocks, and a copy of the package with it."""

import pathlib
import re
import shutil

ROOT = pathlib.Path(__file__).parents[1]
_BLOCK = re.compile(
  r'^```{code-block} (\w+)\n:caption: (\S+)\n\n(.*?)^```$',
  re.DOTALL | re.MULTILINE,
)


def steps(guide: str) -> list[tuple[str, str, str]]:
  """Language, file and text of each block that changes a file."""
  text = (ROOT / 'docs' / 'guides' / f'{guide}.md').read_text()
  return _BLOCK.findall(text)


def copy_package(folder: pathlib.Path) -> None:
  """The package and its recipes, as a checkout has them."""
  ignore = shutil.ignore_patterns('__pycache__')
  for name in ('jaxsparse', 'configs'):
    shutil.copytree(ROOT / name, folder / name, ignore=ignore)


def take(guide: str, folder: pathlib.Path) -> set[str]:
  """Takes a guide's steps in a copy; returns the files that they touch."""
  touched = set()
  for language, name, text in steps(guide):
    file = folder / name
    touched.add(name)
    if language != 'diff':
      assert not file.exists(), f'{name} is there already.'
      file.write_text(text)
      continue
    lines = text.splitlines(keepends=True)
    old, new = (
      ''.join(line[1:] or '\n' for line in lines if line[0] in kept)
      for kept in (' -\n', ' +\n')
    )
    source = file.read_text()
    assert source.count(old) == 1, f'{name} lacks what {guide} changes:\n{old}'
    file.write_text(source.replace(old, new))
  return touched
