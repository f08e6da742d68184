# SPDX-License-Identifier: Apache-2.0
"""What finds held-out pairs without a model, beside which a run's is read."""

from collections.abc import Iterator, Sequence

import numpy as np

from jaxsparse.analysis import retrieval_baselines
from jaxsparse.data.pictures.pair import Pair
from jaxsparse.data.pictures.stored import Read
from jaxsparse.data.pieces import Corpus
from jaxsparse.training.pair_validation import recalls

# Pairs whose captions are held as bags of words at once.
MOST = 4096


def lines(corpus: Corpus, read: Read) -> Iterator[str]:
  """Recall of chance and of linear maps, a line each.

  None of videos, and none of more held-out pairs than `MOST`. Maps are fitted
  on as many of the training pairs, taken evenly.

  Args:
    corpus: of pairs.
    read: of `stored.reader`.
  """
  held_out = list(corpus.validation)
  if len(held_out) > MOST or read(held_out[0].number).ndim != 3:
    return
  step = -(-len(corpus.train) // MOST)
  found = retrieval_baselines.baselines(
    *_read([corpus.train[i] for i in range(0, len(corpus.train), step)], read),
    *_read(held_out, read),
    np.array([pair.item for pair in held_out]),
  )
  for name, one in found.items():
    if name == next(iter(found)):
      yield f'Chance: {recalls(one, lambda side: side.chance.__getitem__)}'
    yield f'By {name}: {recalls(one)}'


def _read(pairs: Sequence[Pair], read: Read) -> tuple[np.ndarray, list[str]]:
  pictures = np.stack([read(pair.number) for pair in pairs])
  return pictures, [pair.captions[0] for pair in pairs]
