# SPDX-License-Identifier: Apache-2.0
"""Byte-pair encoding over bytes: trained on a corpus, or without a merge."""

from collections.abc import Iterator

import numpy as np
import tokenizers

from jaxsparse.data import spelling
from jaxsparse.data.pieces import Corpus

# More text hardly changes the merges that are learned.
_TRAINING_BYTES = 1 << 26


def train(
  corpus: Corpus, vocab_size: int, boundary: str
) -> tokenizers.Tokenizer:
  """Learns merges; the same corpus gives the same ones.

  Args:
    corpus: its training split is read.
    vocab_size: tokens in all.
    boundary: the text of the special token that ends a document.
  """
  tokenizer = _byte_level(tokenizers.models.BPE())
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[boundary],
    initial_alphabet=list(spelling.byte_alphabet()),
    show_progress=False,
  )
  tokenizer.train_from_iterator(_training_texts(corpus), trainer)
  return tokenizer


def without_merges() -> tokenizers.Tokenizer:
  """One token for each byte, with the byte as its number."""
  vocabulary = {
    char: byte[0] for char, byte in spelling.byte_alphabet().items()
  }
  return _byte_level(tokenizers.models.BPE(vocabulary, []))


def _byte_level(model: tokenizers.models.Model) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  return tokenizer


def _training_texts(corpus: Corpus) -> Iterator[str]:
  """Pieces of the training split in a fixed random order, up to a limit."""
  num_bytes = 0
  for i in np.random.default_rng(0).permutation(len(corpus.train)):
    text = corpus.train[i].text
    yield text.decode('utf-8', 'replace')
    num_bytes += len(text)
    if num_bytes >= _TRAINING_BYTES:
      return
