# SPDX-License-Identifier: Apache-2.0
"""How many needles a model finds in its context, and how deep they lie.

A needle is found when, after the true tokens before it, its token has the
highest logit where it is the answer to a question. So one forward pass over
whole documents decides it for all of their questions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.data import needles as needles_lib
from jaxsparse.data.needles import Needles
from jaxsparse.data.tokenizer import Tokenizer
from jaxsparse.experiments.compare.recall import Forward
from jaxsparse.training import evaluation

# Parts of the haystack, from its beginning, of which each has a share.
NUM_DEPTHS = 4
_BATCH_SIZE = 32
_NUM_DOCUMENTS = 8 * _BATCH_SIZE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retrieval:
  """What a model finds in documents that it has never seen."""

  # Share of all needles that are found, and of each part of the haystack.
  share: float
  share_by_depth: tuple[float, ...]
  # Questions that were asked.
  num_questions: int


def measure(
  forward: Forward, tokenizer: Tokenizer, needles: Needles, seed: int
) -> Retrieval:
  """Asks for every needle of 256 documents.

  Args:
    forward: of the model.
    tokenizer: with which it was trained.
    needles: sizes of the documents.
    seed: of their content, which is neither training's nor validation's.
  """
  documents = list(needles_lib.documents(needles, _NUM_DOCUMENTS, seed, 'test'))
  shape = (_BATCH_SIZE, needles.seq_len)
  is_found = []
  for first in range(0, len(documents), _BATCH_SIZE):
    some = documents[first : first + _BATCH_SIZE]
    tokens = np.array(
      [[tokenizer.begin_id, *tokenizer.encode(d.text)] for d in some],
      np.int32,
    )
    batch = dict(
      tokens=tokens,
      # The boundary after the text is no answer.
      targets=np.roll(tokens, -1, axis=1),
      positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
      segment_ids=np.ones(shape, np.int32),
    )
    on_mesh = evaluation.to_global(batch)
    is_right = jax.device_get(_is_first(forward(on_mesh), on_mesh['targets']))
    answers = np.array([d.answers for d in some])
    is_found.append(np.take_along_axis(is_right, answers, axis=1))
  found = np.concatenate(is_found)
  places = np.array([d.places for d in documents])
  part = places * NUM_DEPTHS // needles.haystack_len
  return Retrieval(
    share=float(found.mean()),
    share_by_depth=tuple(
      float(found[part == i].mean()) if (part == i).any() else float('nan')
      for i in range(NUM_DEPTHS)
    ),
    num_questions=found.size,
  )


@jax.jit
def _is_first(logits: jax.Array, targets: jax.Array) -> jax.Array:
  return jnp.argmax(logits, axis=-1) == targets
