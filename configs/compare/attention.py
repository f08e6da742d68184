# SPDX-License-Identifier: Apache-2.0
"""Composed heads against plain ones, at equal widths: bytes, minutes a run.

  python -m jaxsparse compare --suite=configs/compare/attention.py \\
    --workdir=runs/compare_attention --text='books/*.txt'

Without --text on Python's own sources. The models are those of
configs/dcformer.py:tiny with other composition, all with its QK-norm, windows
and widths; `wide` is the control with the FLOPs of `dcmha`, by a wider MLP.
Three seeds (results/compare_attention.json): against the control of the same
seed, at 1.688 nats/byte, `dcmha` has -0.075 to -0.090, `query_wise` -0.075 to
-0.085, `talking_heads` -0.047 to -0.070, `wide` -0.032 to -0.047. So half of
what composition gains is had by its FLOPs alone, and at this size factors of
the keys add nothing to those of the queries. Its tokens/s are of shared cores.
"""

import dataclasses

from jaxsparse import config as c
from jaxsparse.config.attention import query_wise_dcmha
from jaxsparse.experiments.compare.suite import Architecture, Suite
from jaxsparse.run import recipe_files

# 256 bytes and the boundary.
VOCAB_SIZE = 257
WIDE = 368


def get_suite() -> Suite:
  base = recipe_files.shipped('dcformer:tiny')
  control = dataclasses.replace(base.model, dcmha=None, vocab_size=VOCAB_SIZE)
  width = dict(mlp_dim=control.mlp_dim)

  def composed(dcmha: c.DCMHAConfig) -> Architecture:
    return Architecture(model=dict(dcmha=dcmha, **width))

  return Suite(
    base=dataclasses.replace(base, model=control),
    architectures=dict(
      control=Architecture(),
      wide=Architecture(model=dict(mlp_dim=WIDE)),
      talking_heads=composed(
        c.DCMHAConfig(query_wise=False, key_wise=False, base=True)
      ),
      query_wise=composed(query_wise_dcmha()),
      dcmha=composed(c.DCMHAConfig()),
    ),
  )
