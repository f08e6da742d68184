# SPDX-License-Identifier: Apache-2.0
"""The README and the pages of documentation, and their blocks of code."""

import functools
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / 'docs'
PAGES = {
  str(page.relative_to(ROOT)): page.read_text()
  for page in (ROOT / 'README.md', *sorted(DOCS.rglob('*.md')))
  if '_build' not in page.parts
}
_BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str) -> list[str]:
  found = _BLOCK.findall(PAGES[page])
  return [text for name, text in found if name == language]


@functools.cache
def generator():
  """The module that writes the generated pages."""
  if str(DOCS) not in sys.path:
    sys.path.append(str(DOCS))
  import generate

  return generate
