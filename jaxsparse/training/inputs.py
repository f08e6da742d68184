# SPDX-License-Identifier: Apache-2.0
"""What the loop reads, made from a config: its batches and its vocabulary."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from etils import epath

from jaxsparse import config as config_lib
from jaxsparse.config import Config, DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import chats, packing, pipeline, tokenizer_roles
from jaxsparse.data.chat_template import ChatTemplate
from jaxsparse.data.pictures import batches, stored
from jaxsparse.data.pieces import Corpus
from jaxsparse.data.tokenizer import Tokenizer, require_rows
from jaxsparse.run import checkpoint
from jaxsparse.training import pair_baselines, pair_validation
from jaxsparse.training.loop import TrainingData


def with_vocabulary(config: Config, vocab_size: int) -> Config:
  """The config with its vocabulary: the tokenizer's, unless it is larger.

  Raises:
    UserError: it is set, and smaller than the tokenizer's.
  """
  require_rows(config.model.vocab_size, vocab_size)
  model = config.model.with_vocabulary(vocab_size)
  return config_lib.validated(dataclasses.replace(config, model=model))


def training_data(
  config: Config,
  corpus: Corpus,
  tokens: Tokenizer,
  say: Callable[[str], None] = print,
) -> TrainingData:
  """This process's batches, and its rows of the validation pass.

  Raises:
    UserError: of pairs, a picture can't be read, or has another size.
  """
  process = dict(
    process_index=jax.process_index(), process_count=jax.process_count()
  )
  if config.multimodal:
    return _of_pairs(config, corpus, tokens, process, say)
  before = corpus.before
  if before is not None and not before.validation_bytes:
    before = None
  return TrainingData(
    batches=pipeline.train_iterator(
      config.data, corpus, tokens, config.train.seed, **process
    ),
    validation=functools.partial(
      pipeline.validation_batches, config.data, corpus, tokens, **process
    ),
    validation_bytes=corpus.validation_bytes,
    bytes_per_target=bytes_per_target(corpus, tokens),
    old_validation=before
    and functools.partial(
      pipeline.validation_batches, config.data, before, tokens, **process
    ),
    old_validation_bytes=before.validation_bytes if before else 0,
  )


def _of_pairs(
  config: Config,
  corpus: Corpus,
  tokens: Tokenizer,
  process: dict[str, int],
  say: Callable[[str], None],
) -> TrainingData:
  assert config.multimodal is not None
  settings, validation = config.multimodal, list(corpus.validation)
  size = settings.vision.image_size
  found = stored.num_frames(corpus, size)
  if found != settings.num_frames:
    raise UserError(
      f'multimodal.num_frames must be {found} for data.pairs = '
      f'{config.data.pairs!r}, whose items have as many pictures; got '
      f'{settings.num_frames}.'
    )
  read = stored.reader(corpus, size, say)
  batches.tell_of_long_captions(config.data, corpus, tokens, say)
  if config.data.distractors and not any(p.distractors for p in corpus.train):
    raise UserError(
      f'data.distractors must be False with data.pairs = '
      f'{config.data.pairs!r}, which has none to learn from; got True.'
    )
  args = config.data, validation, tokens, read
  baselines = functools.partial(pair_baselines.lines, corpus, read)
  return TrainingData(
    batches=batches.train_iterator(
      config.data, corpus, tokens, config.train.seed, read, **process
    ),
    pairs=pair_validation.HeldOut(
      batches=functools.partial(batches.validation_batches, *args, **process),
      items=np.array([pair.item for pair in validation]),
      choices=functools.partial(batches.candidate_batches, *args, **process),
      num_choices=sum(bool(pair.distractors) for pair in validation),
      baselines=baselines if settings.contrastive_weight else tuple,
    ),
  )


def with_answers(
  config: DataConfig,
  corpus: Corpus,
  tokens: Tokenizer,
  workdir: epath.PathLike,
  say: Callable[[str], None] = print,
) -> tuple[Corpus, ChatTemplate | None]:
  """The corpus that training reads, and with data.messages its template.

  Raises:
    UserError: chats have no template, it refuses them, or they are too long.
  """
  if not corpus.has_chats:
    return corpus, None
  record = checkpoint.read_record(workdir)
  template = chats.template_of(
    config, workdir, has_begun=record is not None and 'data' in record
  )
  corpus = chats.encoded(
    corpus,
    tokens,
    template,
    config.seq_len,
    say,
    tokenizer_roles.digest(workdir),
  )
  return corpus, template


def bytes_per_target(corpus: Corpus, tokens: Tokenizer) -> float:
  """Bytes of text for each target, on the first MB of validation text."""
  num_bytes = num_targets = 0
  for piece in corpus.validation:
    num_bytes += len(piece.text)
    num_targets += packing.num_targets(piece, tokens)
    if num_bytes > 1 << 20:
      break
  return num_bytes / num_targets
