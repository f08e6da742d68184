# SPDX-License-Identifier: Apache-2.0
"""Files of questions: JSON lines of our own form, and those of OLMo.

A line is one of

- a question, `{"context": ..., "choices": [...], "gold": 0}`, where `context`
  may be a list, one for each choice; `delimiter` (by default a space) stands
  before a choice, and `unconditional` (by default '') is the context with which
  a choice has no question before it; null leaves that out;
- a pair, `{"context": ..., "continuation": ...}`;
- a text whose last word is asked for, `{"text": ...}`, as in LAMBADA;
- one choice of a question as OLMo has them, `{"doc_id": 0, "idx": 0, "label":
  1, "request": {"context": ..., "continuation": ...}}`. A question without its
  context is a document of its own there, 1,000,000 further on.
"""

import dataclasses
import gzip
import hashlib
import json
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

from jaxsparse.config.errors import UserError, require_utf8, shown

# What OLMo adds to the number of a document without its context.
_UNCONDITIONAL = 1_000_000


@dataclasses.dataclass(frozen=True)
class Question:
  """What is asked: contexts and continuations, one of each for each choice.

  Attributes:
    id: names it in what is kept.
    contexts: what stands before each choice.
    delimiter: stands between.
    choices: as their lengths are counted.
    gold: index of the right one.
    unconditional: contexts without the question, for pmi; None for none.
  """

  id: str
  contexts: tuple[str, ...]
  choices: tuple[str, ...]
  gold: int
  delimiter: str = ''
  unconditional: tuple[str, ...] | None = None

  @property
  def pairs(self) -> list[tuple[str, str]]:
    """What is scored: the choices, and then those without the question."""
    scored = [self.delimiter + choice for choice in self.choices]
    contexts = self.contexts + (self.unconditional or ())
    return [
      (context, scored[i % len(scored)]) for i, context in enumerate(contexts)
    ]


def read(path: pathlib.Path) -> tuple[list[Question], str]:
  """The questions of a file, and the SHA-256 of its content.

  Args:
    path: of JSON lines, or of a `.gz` of them.

  Raises:
    UserError: the file can't be read, a line has no question, or two have one
      id.
  """
  content = _content(path)
  questions, of_olmo, lines = [], {}, {}
  for number, row in _rows(path, content):
    where = f'line {number} of {str(path)!r}'
    if 'request' in row:
      _add_olmo(of_olmo, row, where)
    else:
      question = _question(row, number, where)
      first = lines.setdefault(question.id, number)
      if first != number:
        raise UserError(
          f'{where} has the id {question.id!r} of line {first}: give each '
          'question its own, or leave ids out, as one would count twice.'
        )
      questions.append(question)
  if questions and of_olmo:
    raise UserError(f'{str(path)!r} mixes lines of two forms: split it.')
  if of_olmo:
    questions = _of_olmo(of_olmo, path)
  if not questions:
    raise UserError(f'{str(path)!r} holds no question.')
  if len({len(q.choices) == 1 for q in questions}) > 1:
    raise UserError(
      f'{str(path)!r} has questions with several choices and with one: split '
      'it, as they are measured differently.'
    )
  return questions, hashlib.sha256(content).hexdigest()


def _content(path: pathlib.Path) -> bytes:
  try:
    content = path.read_bytes()
    return gzip.decompress(content) if path.suffix == '.gz' else content
  except (OSError, EOFError, zlib.error) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f"{str(path)!r} can't be read ({reason}): name a file of JSON lines."
    ) from error


def _rows(path: pathlib.Path, content: bytes) -> Iterator[tuple[int, dict]]:
  for number, line in enumerate(content.split(b'\n'), 1):
    if not line.strip():
      continue
    where = f'line {number} of {str(path)!r}'
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      raise UserError(
        f'{where} is no JSON ({str(error).splitlines()[0]}): write one object '
        'a line.'
      ) from error
    if not isinstance(row, dict):
      raise UserError(f'{where} must be an object, got {shown(row)}.')
    yield number, row


def _question(row: dict, number: int, where: str) -> Question:
  name = str(row.get('id', number))
  if 'choices' in row:
    return _multiple_choice(row, name, where)
  if 'continuation' in row:
    context = _text(row, 'context', where)
    return Question(name, (context,), (_text(row, 'continuation', where),), 0)
  if 'text' in row:
    context, space, word = _text(row, 'text', where).rstrip().rpartition(' ')
    if not space:
      raise UserError(f'{where}: text has a single word, so none is asked for.')
    return Question(name, (context,), (word,), 0, delimiter=' ')
  raise UserError(
    f'{where} has none of choices, continuation, text and request: it has '
    f'{", ".join(map(shown, row)) or "nothing"}.'
  )


def _multiple_choice(row: dict, name: str, where: str) -> Question:
  choices = row['choices']
  if not (isinstance(choices, list) and choices):
    raise UserError(
      f'{where}: choices must be a list of strings, got {shown(choices)}.'
    )
  choices = tuple(_string(c, f'{where}: a choice') for c in choices)
  contexts = row.get('context', '')
  if not isinstance(contexts, list):
    contexts = [contexts] * len(choices)
  if len(contexts) != len(choices):
    raise UserError(
      f'{where} has {len(contexts)} contexts and {len(choices)} choices: give '
      'one context, or one for each choice.'
    )
  unconditional = row.get('unconditional', '')
  if unconditional is not None:
    of_none = _string(unconditional, f'{where}: unconditional')
    unconditional = (of_none,) * len(choices)
  return Question(
    name,
    tuple(_string(c, f'{where}: context') for c in contexts),
    choices,
    _gold(row.get('gold'), 'gold', len(choices), where),
    delimiter=_string(row.get('delimiter', ' '), f'{where}: delimiter'),
    unconditional=None if len(choices) == 1 else unconditional,
  )


def _gold(value: Any, name: str, num_choices: int, where: str) -> int:
  is_index = isinstance(value, int) and not isinstance(value, bool)
  if not (is_index and 0 <= value < num_choices):
    raise UserError(
      f'{where}: {name} must be within 0 and {num_choices - 1}, the index of '
      f'the right choice; got {shown(value)}.'
    )
  return value


def _text(row: dict, name: str, where: str) -> str:
  return _string(row.get(name), f'{where}: {name}')


def _string(value: Any, name: str) -> str:
  if not isinstance(value, str):
    raise UserError(f'{name} must be a string, got {shown(value)}.')
  require_utf8(name, value)
  return value


def _add_olmo(found: dict, row: dict, where: str) -> None:
  """Adds one choice of a question; what was there already is left out."""
  request, key = row['request'], (row.get('doc_id'), row.get('idx'))
  is_right = isinstance(request, dict) and isinstance(
    request.get('continuation'), str
  )
  if not (is_right and all(isinstance(k, int) for k in key)):
    raise UserError(
      f'{where} must have integers doc_id and idx, and a request of a context '
      f'and a continuation; got {shown(row)}.'
    )
  document = found.setdefault(key[0], {})
  document.setdefault(
    key[1],
    (
      _text(request, 'context', where),
      _text(request, 'continuation', where),
      row.get('label'),
      where,
    ),
  )


def _of_olmo(found: dict, path: pathlib.Path) -> list[Question]:
  questions = []
  for number, choices in found.items():
    if number - _UNCONDITIONAL in found:
      continue
    rows = [choices[i] for i in sorted(choices)]
    contexts, texts, labels, wheres = zip(*rows, strict=True)
    without, unconditional = found.get(number + _UNCONDITIONAL), None
    if without is not None:
      if sorted(without) != sorted(choices):
        raise UserError(
          f'{str(path)!r} has other choices in document '
          f'{number + _UNCONDITIONAL} than in {number}, which it repeats '
          'without context.'
        )
      unconditional = tuple(without[i][0] for i in sorted(without))
    gold = 0
    if len(texts) > 1:
      gold = _gold(labels[0], 'label', len(texts), wheres[0])
    questions.append(
      Question(str(number), contexts, texts, gold, unconditional=unconditional)
    )
  return questions
