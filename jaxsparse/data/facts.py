# SPDX-License-Identifier: Apache-2.0
"""Generated biographies: how much a model remembers, in bits known beforehand.

Every person has a unique name and an attribute of each kind, drawn evenly from
a set of known size, so a person is worth `BITS_PER_PERSON` and an attribute can
be known only from having read it before. A biography states all of them in an
order and in phrasings of its own, as in 'Physics of language models'
(arXiv:2309.14316, and 2404.05405 for its part on capacity). `write` makes
ordinary text files of it, and a tokenizer in which a part of a name, a value
and a turn of phrase are one token each:

  Bela Kadson was born in Tamoburg.
  The year of birth of Bela Kadson is 1961.

It is the same for any number of people, so models that remember more or fewer
have the same vocabulary and the same FLOPs.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Iterator

import numpy as np
import tokenizers

from jaxsparse.config.errors import require
from jaxsparse.data import generated

_RECORD_NAME = 'facts.json'

# Changes with the text that a seed gives.
_VERSION = 2

# People of whom there is more text than of others, and their share of it
# beyond the one biography in a round that all have.
_NUM_FAMOUS = 64
FAMOUS_SHARE = 1 / 3


@dataclasses.dataclass(frozen=True)
class Attribute:
  """A kind of fact."""

  name: str
  values: tuple[str, ...]
  # What stands between a person's name and a value; recall asks by the first.
  phrases: tuple[str, ...]
  # What stands before the name in one more form, of which '... is' follows.
  noun: str

  @property
  def bits(self) -> float:
    """Bits that name one of the values."""
    return math.log2(len(self.values))

  def sentence(self, name: str, value: str, form: int) -> str:
    """One of the `num_forms` ways to say it, with its line's end."""
    if form == len(self.phrases):
      return f'The {self.noun} of {name} is {value}.\n'
    return f'{name} {self.phrases[form]} {value}.\n'

  @property
  def num_forms(self) -> int:
    return len(self.phrases) + 1


def _words(number: int, endings: tuple[str, ...], seed: int) -> tuple[str, ...]:
  """Different capitalised words of two syllables and an ending."""
  consonants, vowels = 'bdfgklmnprstvz', 'aeiou'
  syllables = [c + v for c in consonants for v in vowels]
  stems = list(itertools.product(syllables, syllables))
  order = np.random.default_rng(seed).permutation(len(stems))[:number]
  return tuple(
    ''.join(stems[i]).capitalize() + endings[k % len(endings)]
    for k, i in enumerate(order)
  )


# 16,384 names of two tokens.
FIRST_NAMES = _words(128, ('', 'n', 'l'), 1)
LAST_NAMES = _words(128, ('dson', 'wick', 'sen'), 2)
MAX_PEOPLE = len(FIRST_NAMES) * len(LAST_NAMES)

_MONTHS = 'January February March April May June July August September '
_MONTHS += 'October November December'

ATTRIBUTES = (
  Attribute(
    'birth city',
    _words(64, ('burg', 'ton', 'ville'), 3),
    ('was born in', 'comes from', 'grew up in'),
    'city of birth',
  ),
  Attribute(
    'university',
    _words(32, ('ford', 'bridge'), 4),
    ('studied at', 'graduated from', 'has a degree of'),
    'university',
  ),
  Attribute(
    'employer',
    _words(64, ('corp', 'tex', 'works'), 5),
    ('works for', 'is employed by', 'earns a living at'),
    'employer',
  ),
  Attribute(
    'field',
    _words(32, ('logy', 'nomics', 'stry'), 6),
    ('is an expert in', 'knows all about', 'took up'),
    'field',
  ),
  Attribute(
    'birth month',
    tuple(_MONTHS.split()),
    ('has a birthday in', 'was born in the month of', 'turns older in'),
    'month of birth',
  ),
  Attribute(
    'birth year',
    tuple(map(str, range(1940, 2004))),
    ('was born in the year', 'came into the world in', 'is of the class of'),
    'year of birth',
  ),
)

BITS_PER_PERSON = sum(attribute.bits for attribute in ATTRIBUTES)
# Four and a full stop for each fact, and one more in the form with a noun.
TOKENS_PER_BIOGRAPHY = sum(5 + 1 / a.num_forms for a in ATTRIBUTES)


def exposures(num_tokens: int, num_people: int) -> float:
  """How often a text of so many tokens states a fact of a person not famous."""
  return num_tokens / _tokens_per_exposure(num_people)


def num_tokens(num_exposures: int, num_people: int) -> float:
  """Of a text that states these facts so often: the inverse of `exposures`."""
  return num_exposures * _tokens_per_exposure(num_people)


def _tokens_per_exposure(num_people: int) -> float:
  return num_people * TOKENS_PER_BIOGRAPHY / (1 - FAMOUS_SHARE)


@dataclasses.dataclass(frozen=True)
class Question:
  """One fact, asked for in a sentence whose like training has seen.

  `before + answer` tokenizes as `before` and then `answer`.
  """

  before: str
  answer: str
  # Index into `ATTRIBUTES`.
  attribute: int


@dataclasses.dataclass(frozen=True)
class People:
  """Who there is, and what is true of them."""

  names: tuple[str, ...]
  # Indices into each attribute's values, int[people, attributes].
  values: np.ndarray

  @property
  def bits(self) -> float:
    """Of all facts together; who exists is not counted."""
    return len(self.names) * BITS_PER_PERSON

  def biography(self, person: int, rng: np.random.Generator) -> str:
    """Every fact once, in an order and in forms drawn from `rng`."""
    return ''.join(
      ATTRIBUTES[i].sentence(
        self.names[person],
        ATTRIBUTES[i].values[self.values[person, i]],
        int(rng.integers(ATTRIBUTES[i].num_forms)),
      )
      for i in rng.permutation(len(ATTRIBUTES)).tolist()
    )

  def questions(self) -> Iterator[Question]:
    """All facts, person by person.

    A question begins with the end of a sentence, because most sentences that
    training sees come after another.
    """
    for name, row in zip(self.names, self.values, strict=True):
      for i, (attribute, value) in enumerate(zip(ATTRIBUTES, row, strict=True)):
        before = f'.\n{name} {attribute.phrases[0]} '
        yield Question(before, attribute.values[value], i)


def make_people(number: int, seed: int, beside: People | None = None) -> People:
  """The people of a seed; more people are not a superset of fewer.

  Args:
    number: of people.
    seed: of names and facts.
    beside: people whom a model knows already. None of the new ones has the
      name of one of them, but both parts of each new name are parts of theirs,
      so that a model has seen all tokens that tell the new people apart.

  Raises:
    UserError: there are not as many names, or none is wanted.
  """
  free = np.arange(MAX_PEOPLE)
  if beside is not None:
    free = _other_names(beside)
  require(
    1 <= number <= len(free),
    f'the number of people must be 1 to {len(free):,}'
    + ' beside those who are known' * (beside is not None)
    + f', got {number}.',
  )
  rng = np.random.default_rng([_VERSION, seed, number])
  chosen = free[rng.permutation(len(free))[:number]]
  names = tuple(map(_name, chosen.tolist()))
  columns = [rng.integers(len(a.values), size=number) for a in ATTRIBUTES]
  return People(names, np.stack(columns, axis=1))


def _name(i: int) -> str:
  first, last = divmod(i, len(LAST_NAMES))
  return f'{FIRST_NAMES[first]} {LAST_NAMES[last]}'


def _other_names(people: People) -> np.ndarray:
  """Indices of the names made of the parts of theirs, but for their own."""
  taken = set(people.names)
  firsts, lasts = (
    set(parts) for parts in zip(*map(str.split, taken), strict=True)
  )
  return np.array(
    [
      i
      for i in range(MAX_PEOPLE)
      if (name := _name(i)) not in taken
      and name.split()[0] in firsts
      and name.split()[1] in lasts
    ],
    np.int64,
  )


def make_tokenizer() -> tokenizers.Tokenizer:
  """The tokenizer: of names' parts, values and turns of phrase."""
  words = ['.\n', 'is ']
  words += [f'{word} ' for word in FIRST_NAMES + LAST_NAMES]
  for attribute in ATTRIBUTES:
    words += [*attribute.values, f'The {attribute.noun} of ']
    words += [f'{phrase} ' for phrase in attribute.phrases]
  # 'The year of birth of ' | 'Bela ' | '1961' | 'was born in ' | '.\n'
  pattern = r'The (?:[a-z]+ )+|[A-Z][a-z]+ ?|[0-9]+|(?:[a-z]+ )+|\.\n'
  return generated.word_tokenizer(words, pattern)


VOCAB_SIZE = make_tokenizer().get_vocab_size()


def write(
  folder: pathlib.Path, people: People, seed: int, num_phrasings: int = 16
) -> dict:
  """Writes the text and its tokenizer, unless they are there already.

  `num_phrasings` files have a biography of everyone each, in an order of its
  own, and more of a few famous people, which make up `FAMOUS_SHARE` of the text
  (the celebrities of arXiv:2309.14316). On them a model learns early what a
  name and an attribute are to each other; without them it begins to remember
  the later, the more people there are (arXiv:2503.21676), and a short training
  compares beginnings, not capacities.

  One more file, of the same people in new phrasings, is to validate: one
  biography each of at most 1,024 of them.

  Args:
    folder: made where it is missing.
    people: of whom the text is.
    seed: of orders and phrasings.
    num_phrasings: biographies of each person.

  Returns:
    The fields of a `DataConfig` that name text, split and tokenizer.

  Raises:
    UserError: the folder can't be written.
  """
  identity = dict(
    version=_VERSION,
    names=[people.names[0], people.names[-1], len(people.names)],
    seed=seed,
    num_phrasings=num_phrasings,
  )
  return generated.write_once(
    folder / _RECORD_NAME,
    identity,
    make_tokenizer(),
    lambda folder: _write_text(folder, people, seed, num_phrasings),
  )


def _write_text(
  folder: pathlib.Path, people: People, seed: int, num_phrasings: int
) -> float:
  """Returns the share of bytes that are for validation."""
  rng = np.random.default_rng([_VERSION, seed])
  number = len(people.names)
  famous = np.arange(min(_NUM_FAMOUS, number // 4))
  more = round(number * FAMOUS_SHARE / (1 - FAMOUS_SHARE))
  sizes = []
  for i in range(num_phrasings + 1):
    if i < num_phrasings:
      name = f'biographies_{i:03}'
      chosen = np.concatenate([np.arange(number), np.resize(famous, more)])
    else:
      name = 'validation'
      chosen = rng.permutation(number)[:1024]
    order = rng.permutation(chosen).tolist()
    text = ''.join(people.biography(person, rng) for person in order)
    generated.write_whole(folder / f'{name}.txt', text)
    sizes.append(len(text))
  return sizes[-1] / sum(sizes)
