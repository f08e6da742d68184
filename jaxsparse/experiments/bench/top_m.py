# SPDX-License-Identifier: Apache-2.0
"""top_m: the best m of many scores.

Contenders: `ops.top_k.top_m` with equal scores in any order (an order of its
own is given up only from JAX 0.11 on) and by index, a full sort, and PyTorch's
`topk` where it is installed. The least traffic reads every score once.
"""

import argparse

import jax.numpy as jnp
import numpy as np

from jaxsparse.config.errors import require
from jaxsparse.experiments.bench import measuring
from jaxsparse.ops.top_k import top_m, top_m_reference

OPTIONS = dict(tokens=4096, scores=1024, selected=42, rounds=7)


def measure(options: argparse.Namespace) -> list[dict]:
  require(
    options.tokens > 0, f'--tokens must be positive, got {options.tokens}.'
  )
  require(
    0 < options.selected <= options.scores,
    f'--selected must be from 1 to --scores={options.scores}, got '
    f'{options.selected}.',
  )
  task = f'T={options.tokens} Q={options.scores} m={options.selected}'
  num_bytes = 4 * options.tokens * (options.scores + 2 * options.selected)
  return measuring.compare(
    f'top m {task}', contenders(options), options.rounds, num_bytes
  )


def contenders(
  options: argparse.Namespace,
) -> dict[str, measuring.Contender]:
  rng = np.random.default_rng(0)
  scores = rng.standard_normal(
    (options.tokens, options.scores), dtype=np.float32
  )
  m = options.selected
  x = jnp.asarray(scores)
  ways = {
    'unstable': measuring.compiled(lambda x: top_m(x, m), x),
    'stable': measuring.compiled(lambda x: top_m(x, m, is_stable=True), x),
    'sort': measuring.compiled(lambda x: top_m_reference(x, m), x),
  }
  if measuring.has_torch():
    import torch

    tensor = torch.tensor(scores, device=measuring.torch_device())
    ways['torch topk'] = measuring.by_torch(lambda: torch.topk(tensor, m))
  return ways


show = measuring.print_last
