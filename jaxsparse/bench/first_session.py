"""all: every bench once, with sizes for the backend at hand.

On a GPU this is what a first session on one should record; on a CPU the sizes
are small and it takes about three minutes.
"""

from types import ModuleType

import jax

from jaxsparse.bench import (
  grouped_matmul,
  host_memory,
  memory_layer,
  top_m,
  train_step,
  value_bag,
)

_GPU_BAGS = [
  dict(tokens=tokens, width=width, rows=2**20)
  for tokens in (64, 4096, 32_768)
  for width in (256, 1024)
]
_CPU_BAGS = [dict(tokens=tokens, rows=65_536) for tokens in (64, 1024)]


def sections() -> list[tuple[str, ModuleType, list[dict]]]:
  """Title, bench, and the options of each of its runs."""
  on_cpu = jax.default_backend() == 'cpu'
  return [
    ('bag and its gradients', value_bag, _CPU_BAGS if on_cpu else _GPU_BAGS),
    (
      'products with experts',
      grouped_matmul,
      [dict(rounds=3)]
      if on_cpu
      else [dict(depth=2048, width=4096, rows=rows) for rows in (64, 1024)],
    ),
    (
      'best m of many scores',
      top_m,
      [dict(tokens=512)] if on_cpu else [dict(), dict(tokens=64)],
    ),
    (
      'memory layer',
      memory_layer,
      [dict(tokens=128, num_keys=128)] if on_cpu else [dict(tokens=4096)],
    ),
    (
      'train step',
      train_step,
      [dict(rounds=3)]
      if on_cpu
      else [
        dict(),
        dict(
          config='configs/ultramem_151m.py',
          optimizers='adamw',
          tokens=8192,
          seq_len=2048,
          growth=1,
        ),
      ],
    ),
    ('gather from pinned host memory', host_memory, [dict()]),
  ]
