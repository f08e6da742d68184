# SPDX-License-Identifier: Apache-2.0
"""What `train.py --help` prints: where to start, or every field of a part."""

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from jaxsparse.config import Config, fields
from jaxsparse.config.errors import UserError, did_you_mean, shown
from jaxsparse.run import recipe_files

_WIDTH = 80

# The fields that most runs set.
START_HERE = (
  'data.text',
  'data.seq_len',
  'data.batch_size',
  'train.num_steps',
  'optimizer.learning_rate',
  'model.num_layers',
  'model.model_dim',
  'model.attention_pattern',
)


def _parts(
  cls: type, prefix: str = ''
) -> Iterator[tuple[str, tuple[str, type]]]:
  for name, hint in fields.hints(cls).items():
    if (part := fields.part_of(hint)) and prefix + name not in ALIKE:
      yield name, (prefix + name, part)
      yield from _parts(part, f'{prefix}{name}.')


# Parts that have the fields of others.
ALIKE = {'multimodal.vision.stream': 'model'}

# Each part's dotted name and class, in the order of `--help=all`.
PARTS: dict[str, tuple[str, type]] = dict(_parts(Config))


def page(description: str, flags: str, part: str = '') -> str:
  """A page of help.

  Args:
    description: of the program.
    flags: those that are no fields, described.
    part: one of `PARTS`, or 'all'; empty for where to start.

  Raises:
    UserError: there is no such part.
  """
  if part == 'all':
    return '\n\n'.join(_part_page(name) for name in PARTS)
  if part in PARTS:
    return _part_page(part)
  if part:
    raise UserError(
      f'--help={shown(part)[1:-1]} is no part{did_you_mean(part, PARTS)}: name '
      f'one of {", ".join(PARTS)}, or all.'
    )
  sections = [
    description.strip(),
    flags.strip(),
    'Start here:\n' + '\n'.join(_first_lines()),
    'Recipes (--config=NAME:SIZE):\n'
    + textwrap.fill(
      ', '.join(recipe_files.names('configs')),
      _WIDTH,
      initial_indent='  ',
      subsequent_indent='  ',
    ),
    'Every field of a part, its default and what it means:\n'
    + textwrap.fill(
      ', '.join(f'--help={name}' for name in [*PARTS, 'all']),
      _WIDTH,
      initial_indent='  ',
      subsequent_indent='  ',
      break_on_hyphens=False,
    ),
  ]
  return '\n\n'.join(sections)


def describe(cls: type) -> dict[str, str]:
  """The comment in the source on each field that is no part itself."""
  comments, comment = {}, []
  hints = fields.hints(cls)
  for line in inspect.getsource(cls).splitlines():
    text = line.strip()
    if text.startswith('#'):
      comment.append(text.lstrip('# '))
      continue
    name = text.split(':')[0]
    is_field = line.startswith('  ') and name in hints and ':' in text
    if is_field and not fields.part_of(hints[name]):
      comments[name] = ' '.join(comment)
    comment = []
  return comments


def _part_page(name: str) -> str:
  path, cls = PARTS[name]
  config = cls()
  lines = [f'{name}: {inspect.getdoc(cls).splitlines()[0]}']
  for field, comment in describe(cls).items():
    lines.append(_flag(path, field, getattr(config, field)))
    if comment:
      lines.append(_indented(comment))
  for other, model in ALIKE.items():
    if other.rpartition('.')[0] == path:
      lines += [f'  --config.{other}.FIELD', _indented(f'As --help={model}.')]
  return '\n'.join(lines)


def _first_lines() -> list[str]:
  lines = []
  for path in START_HERE:
    holder = Config()
    *parts, name = path.split('.')
    for part in parts:
      holder = getattr(holder, part)
    lines.append(_flag('.'.join(parts), name, getattr(holder, name)))
    lines.append(_indented(describe(type(holder))[name]))
  return lines


def _flag(path: str, name: str, default: Any) -> str:
  # As a shell takes it.
  text = f'"{default}"' if isinstance(default, tuple) else str(default)
  return f'  --config.{path}.{name}={text}'


def _indented(text: str) -> str:
  return textwrap.fill(
    text, _WIDTH, initial_indent='      ', subsequent_indent='      '
  )
