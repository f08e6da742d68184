# SPDX-License-Identifier: Apache-2.0
"""Needles: what sparse attention finds far behind its window.

  python -m jaxsparse compare --suite=configs/compare/needles.py \\
    --workdir=runs/needles

Documents of 128 tokens (`jaxsparse.data.needles`): 21 facts among sentences
that say nothing, and 21 questions after a gap of 24 tokens. One layer, which
can find them. Blocks of 4 tokens, of which a query keeps 10 to 30 %: at the end
27 to 29 %, the mean over tiles. Tiles of 2 tokens, a question and its answer,
as every question asks for another needle and a larger tile would share a choice
among several. The window is as long as the sparse one's on average; `indexer`
is the sparse one with a router of its own (`block_router` of
`jaxsparse.ops.sparse_attention`).
Guessing finds 6 %. Minutes a run on one core.
Three seeds (results/compare_needles.json): dense finds all, `sparse` 97.2 to
98.1 %, `indexer` 97.5 to 98.1 %, `window` 6.4 to 6.6 %.
"""

import dataclasses

from jaxsparse import config as c
from jaxsparse.data import needles
from jaxsparse.experiments.compare.suite import Architecture, Suite


def get_suite() -> Suite:
  documents = needles.Needles()
  width = dict(mlp_dim=128)
  sparse = c.SparseAttentionConfig(
    block=4,
    tile=2,
    window_blocks=2,
    # Rounded up for each tile, these are at most 29.5 % on the mean.
    max_blocks=7,
    min_fraction=0.1,
    max_fraction=0.22,
  )
  return Suite(
    base=c.Config(
      model=c.ModelConfig(
        num_layers=1,
        model_dim=64,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        qk_norm='head',
        vocab_size=needles.VOCAB_SIZE,
        **width,
      ),
      data=c.DataConfig(seq_len=documents.seq_len, batch_size=16),
      optimizer=c.OptimizerConfig(learning_rate=5e-3, warmup_steps=50),
      train=c.TrainConfig(num_steps=500),
    ),
    needles=documents,
    architectures=dict(
      dense=Architecture(),
      sparse=Architecture(
        model=dict(attention_pattern=('sparse',), sparse=sparse, **width)
      ),
      indexer=Architecture(
        model=dict(
          attention_pattern=('sparse',),
          sparse=dataclasses.replace(
            sparse, router='indexer', router_heads=2, router_dim=32
          ),
          **width,
        )
      ),
      window=Architecture(
        model=dict(attention_pattern=('local',), window=12, **width)
      ),
    ),
  )
