# SPDX-License-Identifier: Apache-2.0
"""Writes what of the documentation follows from results, recipes and imports.

  python docs/generate.py

The pages docs/results/*.md, docs/recipes.md and docs/api.md, and the pictures
in docs/pictures. A test compares the pages with what this makes.
"""

import ast
import inspect
import pathlib
import sys
import textwrap
from typing import Any

import drawings
import flax.linen as nn
import results_speed
import results_tables

import jaxsparse
from jaxsparse.analysis import cost, run_cost
from jaxsparse.run import help_pages, recipe_files

DOCS = pathlib.Path(__file__).parent
CONFIGS = DOCS.parent / 'configs'
# For sequences of this length, as scores grow with it.
LENGTH = 2048


def recipes() -> str:
  """The page of recipes: sizes as a table, docstrings as they are."""
  files = sorted(CONFIGS.glob('*.py'))
  parts = [
    '# Recipes\n\n'
    'A recipe is a Python file that makes a config, named by family and size: '
    '`--config=configs/ultramem.py:680m`,\nor from anywhere '
    '`--config=ultramem:680m`. Parameters are without embeddings and FLOPs '
    'per token of a forward pass\nas the papers count them (no embeddings, '
    'scores or lookup); tests hold both against the published figures. Of '
    'pictures it is every product of a pair.\n'
    'We trained only the tiny ones.\n'
  ]
  rows, texts = [], []
  for file in files:
    module = ast.parse(file.read_text())
    docstring = ast.get_docstring(module) or ''
    title, _, rest = docstring.partition('\n')
    family = file.stem
    texts.append(
      f'## {family}\n\n{title}\n\n```text\n{textwrap.dedent(rest).strip()}\n```\n'
    )
    for size in recipe_files.sizes(file) or ['']:
      name = f'{family}:{size}' if size else family
      config = recipe_files.shipped(name)
      counted = run_cost.parameters(config)
      flops = cost.paper_flops(config.model)
      if config.multimodal:
        flops = run_cost.forward_flops(config)
      rows.append(
        [
          f'`{name}`',
          words(counted.published),
          words(counted.active),
          words(counted.values),
          words(flops, 'G'),
        ]
      )
  head = ['recipe', 'parameters', 'of them used by each token', 'values']
  parts.append(results_tables.table([*head, 'FLOPs a token'], rows) + '\n')
  return '\n'.join([*parts, *texts])


def words(count: int, billion: str = 'B') -> str:
  for unit, letter in ((1e9, billion), (1e6, 'M'), (1e3, 'k')):
    if count >= unit:
      return f'{count / unit:.3g}{letter}'
  return str(count) if count else '-'


def api() -> str:
  """The page of public names, as modules, settings and functions."""
  groups = {'Modules': [], 'Settings': [], 'Functions and types': []}
  for name in sorted(jaxsparse.__all__):
    value = getattr(jaxsparse, name)
    if name.startswith('__'):
      continue
    if not isinstance(value, type):
      groups['Functions and types'].append(f'autofunction:: {home(value)}')
    elif name.endswith('Config'):
      groups['Settings'].append(settings(name, value))
    elif issubclass(value, nn.Module):
      members = ', '.join(['__call__', *methods(value)])
      groups['Modules'].append(
        f'autoclass:: {home(value)}\n:members: {members}'
      )
    else:
      groups['Functions and types'].append(f'autoclass:: {home(value)}')
  text = (
    '# API\n\nWhat a program of yours may use, as `from jaxsparse import '
    'MemoryLayer`. Each name is imported when it is first asked for,\nso that '
    'one layer brings no more than it needs. `jaxsparse.__version__` is the '
    'version.\n'
  )
  for title, directives in groups.items():
    text += f'\n## {title}\n'
    for directive in directives:
      if directive.startswith('\n###'):
        text += directive
        continue
      indented = directive.replace('\n', '\n   ')
      text += f'\n```{{eval-rst}}\n.. {indented}\n```\n'
  return text


def methods(module: type) -> list[str]:
  """What a caller of a module may call besides itself."""
  return [
    name
    for name, member in vars(module).items()
    if inspect.isfunction(member) and name[0] != '_' and name != 'setup'
  ]


def settings(name: str, cls: type) -> str:
  """The fields of a settings class, with the comments in its source."""
  first = inspect.getdoc(cls).splitlines()[0]
  default, rows = cls(), []
  for field, comment in help_pages.describe(cls).items():
    rows.append([f'`{field}`', f'`{getattr(default, field)!r}`', comment])
  fields = results_tables.table(['field', 'default', 'meaning'], rows)
  return f'\n### {name}\n\n{first}\n\n{fields}\n'


def home(value: Any) -> str:
  return f'{value.__module__}.{value.__qualname__}'


def pages() -> dict[str, str]:
  """Path under docs/ -> text."""
  made = {f'results/{n}.md': page() for n, page in results_speed.PAGES.items()}
  return made | {'recipes.md': recipes(), 'api.md': api()}


def main() -> None:
  for name, text in pages().items():
    (DOCS / name).write_text(text)
  drawings.draw_all(DOCS / 'pictures')


if __name__ == '__main__':
  sys.exit(main())
