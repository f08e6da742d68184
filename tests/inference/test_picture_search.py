# SPDX-License-Identifier: Apache-2.0
"""The towers rank all, and a matching head the best few of them."""

import jax
import numpy as np
import seeing_run

from jaxsparse.data.pictures import batches
from jaxsparse.data.pictures.augment import scaled
from jaxsparse.data.pictures.pair import Pair
from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.inference import picture_search

MATCHING = seeing_run.config(
  'co_attention', caption_weight=0.0, matching_weight=1.0, num_fusion_layers=1
)
PICTURES = seeing_run.pictures(6)
PAIRS = [
  Pair(name=name, number=i, captions=(name,))
  for i, name in enumerate(('a cat', 'a dog', 'red', 'hills', 'x', 'two men'))
]


def test_a_matching_head_orders_the_best(monkeypatch):
  monkeypatch.setattr(picture_search, '_ROWS', 4)
  module = seeing_run.module_of(MATCHING)
  params = seeing_run.params_of(MATCHING)
  tokenizer = ByteTokenizer()
  search = picture_search.PictureSearch(
    MATCHING, params, tokenizer, PAIRS, PICTURES.__getitem__, lambda _: None
  )
  run = jax.jit(module.apply)

  def alone(caption, picture):
    row = batches.text_row(MATCHING.data, tokenizer, caption)
    found = run(
      {'params': params}, row['tokens'][None], scaled(picture)[None],
      row['segment_ids'][None],
    )  # fmt: skip
    cosine = found['text_embedding'][0] @ found['image_embedding'][0]
    scale = np.exp(found['log_temperature'])
    return float(cosine), float(scale * cosine + found['match'][0])

  of_pair = {i: alone(PAIRS[i].captions[0], PICTURES[0]) for i in range(6)}
  by_towers = sorted(of_pair, key=lambda i: -of_pair[i][0])
  few = sorted(by_towers[:4], key=lambda i: -of_pair[i][1])
  assert few != by_towers[:4]
  found = search.by_picture(PICTURES[0], 5)
  assert [one.pair.number for one in found] == [*few, by_towers[4]]
  for one in found[:4]:
    np.testing.assert_allclose(
      (one.score, one.match), of_pair[one.pair.number], rtol=1e-4
    )
  assert found[4].match is None
  # As many as are wanted, of the best few.
  assert search.by_picture(PICTURES[0], 2) == found[:2]
  of_picture = [alone('a dog', picture)[0] for picture in PICTURES]
  found = search.by_text('a dog', 5)
  assert [one.pair.number for one in found] == [
    *np.argsort(-np.array(of_picture))[:5]
  ]
  assert all(one.match is None for one in found)
