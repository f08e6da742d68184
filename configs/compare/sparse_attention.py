# SPDX-License-Identifier: Apache-2.0
"""Sparse attention against attention to everything, and to a window.

  python -m jaxsparse compare --suite=configs/compare/sparse_attention.py \\
    --workdir=runs/compare_sparse_attention --text='books/*.txt'

Without --text on Python's own sources: bytes, minutes a run on one core. The
models are those of configs/sparse_attention.py:tiny with other attention and
equal widths, so that a difference is the attention's; the window is as long as
the sparse one's on average.
Three seeds (results/compare_sparse_attention.json): against the dense model of
the same seed, at 1.942 nats/byte, `sparse` has -0.137 to -0.156, `window`
-0.196 to -0.227. So sparse attention loses nothing, and 1M bytes teach a model
of this size nothing from afar: the less it may read, the better.
configs/compare/needles.py shows what it reads there. Kept blocks at the end: 27
to 29 % on the mean over tiles (`kept_share` in the results).
"""

import dataclasses

from jaxsparse.experiments.compare.suite import Architecture, Suite
from jaxsparse.run import recipe_files

# 256 bytes and the boundary.
VOCAB_SIZE = 257


def get_suite() -> Suite:
  base = recipe_files.shipped('sparse_attention:tiny')
  sparse = base.model
  width = dict(mlp_dim=sparse.mlp_dim)
  dense = dataclasses.replace(
    sparse, attention_pattern=('global',), sparse=None, vocab_size=VOCAB_SIZE
  )
  return Suite(
    base=dataclasses.replace(base, model=dense),
    architectures=dict(
      dense=Architecture(),
      sparse=Architecture(
        model=dict(attention_pattern=('sparse',), sparse=sparse.sparse, **width)
      ),
      window=Architecture(
        model=dict(attention_pattern=('local',), window=40, **width)
      ),
    ),
  )
