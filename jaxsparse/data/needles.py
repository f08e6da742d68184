# SPDX-License-Identifier: Apache-2.0
"""Needles in haystacks: documents that end with questions on their beginning.

A needle is a fact that is drawn anew in each document, so only reading it there
gives the answer. Needles lie among sentences that say nothing; then come only
such sentences, for longer than a window should reach; then the questions, each
with its needle as the answer:

  The sky is blue.
  Bela lives in Tamoburg.
  The grass is green.
  ...
  Where does Bela live? Bela lives in Tamoburg.

No needle is asked for twice, so no answer can be read off another. `write`
makes ordinary text files, one a document, and a tokenizer in which a needle, a
question and a word of the other sentences are one token each. So a question has
to find one token among many, and one layer of attention can: two steps, as from
a name to itself and on to what follows (arXiv:2312.04927), want more training
than minutes on a CPU.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator

import numpy as np
import tokenizers

from jaxsparse.config.errors import require
from jaxsparse.data import facts, generated

_RECORD_NAME = 'needles.json'

# Changes with the text that a seed gives.
_VERSION = 1

_NAMES = facts.FIRST_NAMES[:32]
_VALUES = facts.ATTRIBUTES[0].values[:16]
_FILLERS = (
  'The sky is blue.\n',
  'The grass is green.\n',
  'The sun is yellow.\n',
  'The snow is white.\n',
)
_TOKENS_PER_FILLER = 4
# The question and the needle.
_TOKENS_PER_ANSWER = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles:
  """Sizes of the documents, and how many there are."""

  # Tokens among the fillers before the gap.
  num_needles: int = 21
  # Sentences of 4 tokens among the needles.
  num_fillers: int = 10
  # Such sentences between these and the first question.
  gap: int = 6
  # Documents to train on, and to validate.
  num_documents: int = 4096
  num_validation: int = 256

  def __post_init__(self):
    require(
      1 <= self.num_needles <= len(_NAMES),
      f'num_needles must be 1 to {len(_NAMES)}, got {self.num_needles}.',
    )
    require(
      min(self.num_fillers, self.gap) >= 0,
      'num_fillers and gap must be at least 0, got '
      f'{self.num_fillers} and {self.gap}.',
    )
    require(
      min(self.num_documents, self.num_validation) > 0,
      'num_documents and num_validation must be positive, got '
      f'{self.num_documents} and {self.num_validation}.',
    )

  @property
  def haystack_len(self) -> int:
    """Tokens among which the needles lie."""
    return self.num_needles + _TOKENS_PER_FILLER * self.num_fillers

  @property
  def seq_len(self) -> int:
    """Tokens of the packed row that a document fills, with its boundary."""
    gap = _TOKENS_PER_FILLER * self.gap
    answers = _TOKENS_PER_ANSWER * self.num_needles
    return 1 + self.haystack_len + gap + answers


@dataclasses.dataclass(frozen=True)
class Document:
  """One text, and where its answers and their needles are."""

  text: str
  # Index of each question's answer among the tokens of the text.
  answers: tuple[int, ...]
  # Index of each one's needle, in the order of the answers.
  places: tuple[int, ...]


def documents(
  needles: Needles, number: int, seed: int, part: str
) -> Iterator[Document]:
  """Documents of a seed; those of 'train', 'validation', 'test' differ."""
  index = ('train', 'validation', 'test').index(part)
  rng = np.random.default_rng([_VERSION, seed, index])
  for _ in range(number):
    yield _document(needles, rng)


def _document(needles: Needles, rng: np.random.Generator) -> Document:
  number = needles.num_needles
  names = [_NAMES[i] for i in rng.permutation(len(_NAMES))[:number]]
  values = [_VALUES[i] for i in rng.integers(len(_VALUES), size=number)]
  is_needle = np.zeros(number + needles.num_fillers + needles.gap, bool)
  chosen = rng.permutation(number + needles.num_fillers)[:number]
  is_needle[chosen] = True
  lines = rng.choice(_FILLERS, is_needle.size).tolist()
  length = np.where(is_needle, 1, _TOKENS_PER_FILLER)
  start = np.cumsum(length) - length
  for line, name, value in zip(
    np.flatnonzero(is_needle), names, values, strict=True
  ):
    lines[line] = _needle(name, value)
  places = start[is_needle]
  order = rng.permutation(number)
  for i in order:
    lines.append(_question(names[i]) + _needle(names[i], values[i]))
  answers = length.sum() + _TOKENS_PER_ANSWER * np.arange(number) + 1
  return Document(
    ''.join(lines), tuple(answers.tolist()), tuple(places[order].tolist())
  )


def _needle(name: str, value: str) -> str:
  return f'{name} lives in {value}.\n'


def _question(name: str) -> str:
  return f'Where does {name} live? '


def make_tokenizer() -> tokenizers.Tokenizer:
  """The tokenizer: of needles, questions and words."""
  words = [_needle(name, value) for name in _NAMES for value in _VALUES]
  words += [_question(name) for name in _NAMES]
  fillers = [filler.split(' ') for filler in _FILLERS]
  words += sorted({f'{word} ' for filler in fillers for word in filler[:-1]})
  words += [filler[-1] for filler in fillers]
  pattern = '|'.join(
    (
      _question('[A-Z][a-z]+').replace('?', r'\?'),
      _needle('[A-Z][a-z]+', '[A-Z][a-z]+').replace('.', r'\.'),
      'The ',
      '[a-z]+ ',
      r'[a-z]+\.\n',
    )
  )
  return generated.word_tokenizer(words, pattern)


VOCAB_SIZE = make_tokenizer().get_vocab_size()


def write(folder: pathlib.Path, needles: Needles, seed: int) -> dict:
  """Writes the documents and their tokenizer, unless they are there already.

  Args:
    folder: made where it is missing.
    needles: sizes and numbers of the documents.
    seed: of their content.

  Returns:
    The fields of a `DataConfig` that name text, split and tokenizer.

  Raises:
    UserError: the folder can't be written.
  """
  identity = repr((_VERSION, seed, needles))
  # Files of other sizes must not lie beside these.
  texts = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
  return generated.write_once(
    texts / _RECORD_NAME,
    dict(identity=identity),
    make_tokenizer(),
    lambda texts: _write_text(texts, needles, seed),
  )


def _write_text(texts: pathlib.Path, needles: Needles, seed: int) -> float:
  """Returns the share of bytes that are for validation."""
  sizes = {}
  for part, number in (
    ('train', needles.num_documents),
    ('validation', needles.num_validation),
  ):
    # 'validation' comes after 'train' in the order of names.
    for i, document in enumerate(documents(needles, number, seed, part)):
      generated.write_whole(texts / f'{part}_{i:06}.txt', document.text)
      sizes[part] = sizes.get(part, 0) + len(document.text)
  return sizes['validation'] / sum(sizes.values())
