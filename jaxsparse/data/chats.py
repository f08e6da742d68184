# SPDX-License-Identifier: Apache-2.0
"""Chats as a corpus: split by content, and made into tokens with their answers.

They are held in memory, as they are few beside the texts of pre-training.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import (
  builder,
  chat_files,
  kept_answers,
  tokenizer_roles,
)
from jaxsparse.data.chat_files import Chat
from jaxsparse.data.chat_template import ChatTemplate, RefusedError
from jaxsparse.data.percent import Percent
from jaxsparse.data.pieces import Answers, Corpus
from jaxsparse.data.tokenizer import Tokenizer
from jaxsparse.run import workdir as workdir_lib

Say = Callable[[str], None]

# Raised when the same chats would be split in another way.
_FORMAT = 1


def read(config: DataConfig, corpora: pathlib.Path) -> Corpus:
  """The chats of data.messages, which `encoded` makes readable for a model.

  Which split a chat belongs to, its content decides: equal chats never lie in
  two, and more chats move few of the others.

  Args:
    config: names the files and the shares.
    corpora: the folder of built corpora.

  Raises:
    UserError: a file can't be read, a line is no chat, or there are too few.
  """
  chats = list(chat_files.read(config.messages))
  digests = [hashlib.sha256(c.identity.encode()).hexdigest() for c in chats]
  splits, ranked = {}, sorted(set(digests))
  for name in ('validation', 'test'):
    share = getattr(config, f'{name}_fraction')
    number = max(round(share * len(ranked)), 1) if share else 0
    chosen, ranked = set(ranked[:number]), ranked[number:]
    splits[name] = [
      c for c, d in zip(chats, digests, strict=True) if d in chosen
    ]
  rest = set(ranked)
  splits['train'] = [
    c for c, d in zip(chats, digests, strict=True) if d in rest
  ]
  if not (rest and splits['validation']):
    raise UserError(
      f'data.messages = {config.messages!r} has {len(set(digests))} different '
      'chats, too few to train and to validate: give more.'
    )
  shares = [config.validation_fraction, config.test_fraction]
  identity = json.dumps(['chats', _FORMAT, *shares, *digests])
  key = hashlib.sha256(identity.encode()).hexdigest()[:24]
  directory = corpora / key
  with builder.user_errors(directory):
    directory.mkdir(parents=True, exist_ok=True)
  return Corpus(
    key=key,
    directory=directory,
    train=splits['train'],
    validation=splits['validation'],
    test=splits['test'] or None,
    validation_bytes=_num_bytes(splits['validation']),
    has_chats=True,
  )


def template_of(
  config: DataConfig, workdir: epath.PathLike, has_begun: bool
) -> ChatTemplate:
  """The template of a run's chats, which its workdir keeps.

  It is that of data.chat_template, or the model's own.

  Args:
    config: may name the template.
    workdir: of the run.
    has_begun: whether the run has a checkpoint, and so its template.

  Raises:
    UserError: there is none, it can't be read, or data.chat_template is not
      that with which the run began.
  """
  own = ChatTemplate.of_workdir(str(workdir))
  if not config.chat_template:
    if own is None:
      raise UserError(
        'data.messages needs a template of chats, and the model has none: name '
        'one by data.chat_template=FILE, or start from a model with one by '
        'train.start_from.'
      )
    return own
  given = ChatTemplate.read(config.chat_template, 'data.chat_template')
  if own is not None and own.source == given.source:
    return own
  if has_begun:
    raise UserError(
      f'data.chat_template = {config.chat_template!r} is not the template with '
      f'which the run of workdir {str(workdir)!r} began: undo the change or '
      'give another --workdir.'
    )
  with workdir_lib.write_errors(workdir):
    workdir_lib.write_whole(
      epath.Path(workdir) / tokenizer_roles.CHAT_TEMPLATE,
      given.source.encode(),
    )
  return given


def encoded(
  corpus: Corpus,
  tokenizer: Tokenizer,
  template: ChatTemplate,
  seq_len: int,
  say: Say,
  tokenizer_digest: str = '',
) -> Corpus:
  """The chats as tokens, as far as they fit into a row.

  They are made once, as thousands of them take minutes, and kept beside their
  corpus. A chat that is longer than a row ends behind the last answer that ends
  within it; one of which no answer does is left out. Of both, `say` gets the
  number.

  Args:
    corpus: of `read`.
    tokenizer: of the model.
    template: writes the chats.
    seq_len: tokens of a row.
    say: gets a sentence if a chat is too long, and the progress.
    tokenizer_digest: of `tokenizer_roles.digest`; '' keeps nothing.

  Raises:
    UserError: the template refuses a chat, or none fits.
  """
  file = kept_answers.file_of(
    corpus.directory, tokenizer_digest, template.source, seq_len
  )
  kept = kept_answers.read(file) if tokenizer_digest else None
  if kept is None:
    made, counts = _made(corpus, tokenizer, template, seq_len, say)
    if tokenizer_digest:
      kept_answers.write(file, made, dataclasses.asdict(counts))
  else:
    made, counts = kept[0], _Counts(**kept[1])
  if counts.shortened or counts.left_out:
    say(
      f'Chats longer than data.seq_len = {seq_len} tokens: '
      f'{counts.shortened + counts.left_out:,} of {counts.total:,} (up to '
      f'{counts.longest:,}); shortened to the answers that fit: '
      f'{counts.shortened:,}; left out, as none fits: {counts.left_out:,}.'
    )
  return dataclasses.replace(
    corpus,
    train=made['train'],
    validation=made['validation'],
    test=made['test'] or None,
    validation_bytes=_num_bytes(made['validation']),
  )


def _made(
  corpus: Corpus,
  tokenizer: Tokenizer,
  template: ChatTemplate,
  seq_len: int,
  say: Say,
) -> tuple[kept_answers.Splits, '_Counts']:
  made, counts = {}, _Counts()
  for name in ('train', 'validation', 'test'):
    chats = getattr(corpus, name)
    percent = Percent(f'Reading the chats of {name}', len(chats or ()), say)
    made[name] = []
    for i, chat in enumerate(chats or ()):
      made[name] += _sequences(chat, tokenizer, template, seq_len, counts)
      percent.reach(i + 1)
    if chats and not made[name]:
      raise UserError(
        f'data.seq_len = {seq_len} is shorter than every chat of {name}, of '
        f'which the longest has {counts.longest:,} tokens: raise it.'
      )
  return made, counts


@dataclasses.dataclass
class _Counts:
  total: int = 0
  shortened: int = 0
  left_out: int = 0
  # Tokens of the longest chat.
  longest: int = 0


def _sequences(
  chat: Chat,
  tokenizer: Tokenizer,
  template: ChatTemplate,
  seq_len: int,
  counts: _Counts,
) -> list[Answers]:
  try:
    found = template.answers(chat.messages, tokenizer)
  except RefusedError as error:
    sentence = str(error).rstrip('.')
    raise UserError(
      f"{chat.place} can't be learned: {sentence[:1].lower()}{sentence[1:]}."
    ) from error
  kept, loses = [], False
  for tokens, answer_of in found:
    is_learned = np.isin(answer_of, chat.learned)
    counts.longest = max(counts.longest, len(tokens))
    # The last target of a row is the token behind its last one.
    ends = np.flatnonzero(_is_end(answer_of) & is_learned)
    fits = ends[ends <= seq_len]
    loses |= len(fits) < len(ends)
    if len(fits):
      stop = int(fits[-1]) + 1
      texts = [
        chat.messages[i]['content']
        for i in dict.fromkeys(answer_of[:stop][is_learned[:stop]].tolist())
      ]
      kept.append(
        Answers(tokens[:stop], is_learned[:stop], '\n'.join(texts).encode())
      )
  counts.total += 1
  counts.shortened += bool(loses and kept)
  counts.left_out += bool(loses and not kept)
  return kept


def _is_end(answer_of: np.ndarray) -> np.ndarray:
  """Whether an answer ends with each token."""
  after = np.append(answer_of[1:], -1)
  return (answer_of >= 0) & (after != answer_of)


def _num_bytes(chats: Sequence[Chat] | Sequence[Answers]) -> int:
  return sum(len(chat.text) for chat in chats)
