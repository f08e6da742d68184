# SPDX-License-Identifier: Apache-2.0
"""A small vocabulary for captions: their words, in lower case."""

from collections.abc import Sequence

import tokenizers

from jaxsparse.data.pieces import Corpus

# More of them stand in too few captions to be learned.
MOST_WORDS = 1 << 15


def train(corpus: Corpus, boundary: str) -> tokenizers.Tokenizer:
  """Learns words; the same captions give the same ones.

  Args:
    corpus: of pairs; all captions and prompts of its training split are read.
    boundary: the text of the special token that ends a caption.
  """
  unknown = '<unk>'
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(unk_token=unknown)
  )
  # Letters and digits with the space before them, or one sign.
  tokenizer.normalizer = tokenizers.normalizers.Sequence(
    [tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()]
  )
  pieces = tokenizers.pre_tokenizers
  tokenizer.pre_tokenizer = pieces.Sequence(
    [pieces.WhitespaceSplit(), pieces.Metaspace(), pieces.Punctuation()]
  )
  tokenizer.decoder = tokenizers.decoders.Metaspace()
  trainer = tokenizers.trainers.WordLevelTrainer(
    vocab_size=MOST_WORDS,
    special_tokens=[boundary, unknown],
    show_progress=False,
  )
  tokenizer.train_from_iterator(_texts(corpus.train), trainer)
  return tokenizer


def _texts(pairs: Sequence) -> list[str]:
  return [pair.text.decode() for pair in pairs]
