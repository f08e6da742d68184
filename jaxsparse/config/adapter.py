# SPDX-License-Identifier: Apache-2.0
"""Configuration of what a run learns beside a base that it never writes."""

import dataclasses
import functools
import math
import re
from typing import Any

from jaxsparse.config import fields
from jaxsparse.config.errors import (
  UserError,
  require,
  require_choice,
  require_positive,
  require_unset,
)

KINDS = ('', 'lora', 'rows')
# How rows of memories are chosen, see `ops.memory.row_ranking`.
RANKINGS = ('tfidf', 'kl')

# Settings in adapter.json, by kind.
_NAMES = dict(
  lora=dict(
    r='rank',
    alpha='alpha',
    dropout='dropout',
    rslora='use_rslora',
    dora='use_dora',
    targets='targets',
  ),
  rows=dict(
    ranking='ranking',
    num_rows='num_rows',
    ranking_unit='ranking_unit',
    ranking_tokens='ranking_tokens',
  ),
)

# Queries and values, as the paper of LoRA has them.
_TARGETS = 'attention/(query|value)$'


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class AdapterConfig:
  """An adapter beside the model of train.start_from, which stays as it is."""

  # What is learned: 'lora', low-rank differences of matrices; 'rows',
  # differences of the few rows of memory layers that the text is about. Empty:
  # the model itself, without an adapter.
  kind: str = ''
  # Of the folder in the run's adapters/ that holds it.
  name: str = 'adapter'
  # Rank r of the differences.
  rank: int = 16
  # A difference is multiplied by alpha / rank; with use_rslora by
  # alpha / sqrt(rank).
  alpha: float = 32.0
  # Share of a matrix's inputs that its difference does not see in training.
  dropout: float = 0.0
  # Keep the size of differences of whatever rank (arXiv:2312.03732).
  use_rslora: bool = False
  # Learn the length of each output's column apart from its direction
  # (arXiv:2402.09353).
  use_dora: bool = False
  # Matrices whose path this regular expression finds get a difference:
  # '(attention|mlp)/(query|key|value|output|gate|up|down)$' are all of
  # attention and MLPs, 'moe/(gate|up|down)$' experts,
  # 'memory/(query|output|gate)$' maps of memory layers.
  targets: str = _TARGETS
  # How the base is stored in fewer bits while it is trained beside, such as
  # 'weights=nf4' (QLoRA, arXiv:2305.14314); as --quantize of generate. Empty:
  # as it is.
  quantize: str = ''
  # Rows that are learned, of all tables together.
  num_rows: int = 2000
  # How they are ranked, by their reads of the training text and of a
  # background, which is the text of data.replay, or else that of the base:
  # 'tfidf' (arXiv:2510.15103), where rows count less that many sequences of the
  # background read, or 'kl', by how much more often the text reads them than
  # the background does.
  ranking: str = 'tfidf'
  # Tokens that tf-idf counts as one document of the background. Where they are
  # many, every row is in every document, and none is ranked.
  ranking_unit: int = 64
  # Tokens of either text that are ranked by, at most.
  ranking_tokens: int = 2**20

  def __post_init__(self):
    fields.check(self)
    require_choice(self, 'kind', KINDS)
    require(
      bool(re.fullmatch(r'[A-Za-z0-9_][\w.-]*', self.name)),
      'name must be a plain name of a folder, of letters, digits and _ . -, '
      f'got {self.name!r}.',
    )
    require_positive(self, 'rank', 'alpha')
    require_choice(self, 'ranking', RANKINGS)
    require_positive(self, 'num_rows', 'ranking_unit', 'ranking_tokens')
    require(
      0 <= self.dropout < 1,
      f'dropout must be at least 0 and below 1, got {self.dropout}.',
    )
    try:
      re.compile(self.targets)
    except re.error as error:
      raise UserError(
        f'targets must be a regular expression, got {self.targets!r}: {error}.'
      ) from None
    unset = functools.partial(require_unset, self)
    of_lora = (
      *('rank', 'alpha', 'dropout', 'use_rslora', 'use_dora', 'targets'),
      'quantize',
    )
    unset(self.kind != 'lora', f'kind = {self.kind!r}', *of_lora)
    of_rows = 'num_rows', 'ranking', 'ranking_unit', 'ranking_tokens'
    unset(self.kind != 'rows', f'kind = {self.kind!r}', *of_rows)
    unset(
      self.ranking != 'tfidf', f'ranking = {self.ranking!r}', 'ranking_unit'
    )
    unset(not self.kind, "kind = ''", 'name')

  @property
  def scale(self) -> float:
    """What differences A B are multiplied by."""
    divisor = math.sqrt(self.rank) if self.use_rslora else self.rank
    return self.alpha / divisor

  def to_json(self) -> dict[str, Any]:
    """Settings of the kind as adapter.json has them, by the names of peft."""
    named = {ours: theirs for theirs, ours in _NAMES[self.kind].items()}
    return {theirs: getattr(self, ours) for ours, theirs in named.items()}

  @classmethod
  def from_json(cls, content: dict[str, Any]) -> 'AdapterConfig':
    """The config that `to_json` wrote, among whatever else.

    Raises:
      UserError: a setting is missing or wrong.
    """
    kind = content['kind']
    missing = [name for name in _NAMES[kind] if name not in content]
    require(
      not missing,
      f'adapter.json must have {"".join(missing[:1])!r}, a setting of '
      f'{kind!r}, but has not: it is damaged.',
    )
    settings = {ours: content[name] for name, ours in _NAMES[kind].items()}
    return cls(kind=kind, **settings)


def check_base(adapter: AdapterConfig, train: Any, optimizer: Any) -> None:
  """Refuses an adapter without a base, and what would train more than it.

  Args:
    adapter: of a run.
    train: its `TrainConfig`.
    optimizer: its `OptimizerConfig`.
  """
  require(
    bool(train.start_from) or not adapter.kind,
    'train.start_from must name the workdir of the base with adapter.kind = '
    f'{adapter.kind!r}.',
  )
  require_unset(
    optimizer,
    bool(adapter.kind),
    f'adapter.kind = {adapter.kind!r}, which trains the adapter alone',
    'trained',
  )
