# SPDX-License-Identifier: Apache-2.0
"""all: every bench once, with sizes for the backend at hand.

On a GPU this is what a first session on one should record; on a CPU the sizes
are small and it takes about ten minutes.
"""

from types import ModuleType

import jax

from jaxsparse.experiments.bench import (
  attention,
  decode,
  grouped_matmul,
  host_memory,
  long_input,
  measuring,
  memory_layer,
  quantized,
  top_m,
  train,
  train_step,
  value_bag,
)

_GPU_BAGS = [
  dict(tokens=tokens, width=width, rows=2**20)
  for tokens in (64, 4096, 32_768)
  for width in (256, 1024)
]
# Two sparse models of 18 GB fit beside a cache.
_DECODE = dict(
  family='680m',
  models='dense,moe,ultramem',
  batches='1,4,16,64,128,256',
  dtype='bfloat16',
  context=2048,
  steps=32,
  width_multiple=64,
)
_CPU_BAGS = [dict(tokens=tokens, rows=65_536) for tokens in (64, 1024)]


def sections(
  on_cpu: bool | None = None,
) -> list[tuple[str, ModuleType, list[dict]]]:
  """Title, bench, and the options of each of its runs.

  Args:
    on_cpu: whether sizes are for a CPU; by default by the backend at hand.
  """
  if on_cpu is None:
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
      'training beside PyTorch',
      train,
      [dict(peer='torch' if measuring.has_torch() else '', rounds=3)]
      if on_cpu
      else [],
    ),
    (
      'train step',
      train_step,
      [dict(rounds=3)]
      if on_cpu
      else [
        dict(),
        dict(
          config='ultramem:151m',
          optimizers='adamw',
          tokens=8192,
          seq_len=2048,
          growth=1,
        ),
      ],
    ),
    (
      'attention',
      attention,
      [dict(lengths='1024', context=2048, train_length=256, rounds=2)]
      if on_cpu
      else [
        dict(
          lengths='8192,32768,131072',
          context=131_072,
          train_length=2048,
          heads=16,
          dtype='bfloat16',
        )
      ],
    ),
    (
      'decode',
      decode,
      [dict(batches='1,16', kv_groups='4', rounds=2)]
      if on_cpu
      else [
        _DECODE | dict(kv_groups='1', batches='1,4,16'),
        _DECODE | dict(kv_groups='4', batches='1,4,16,64,128'),
        _DECODE | dict(kv_groups='8', routing='uniform,zipf'),
        _DECODE | dict(kv_groups='8', batches='64', models='dense,moe,pkm'),
      ],
    ),
    ('long input', long_input, [dict(tokens=16_384, stretch=4096)]),
    ('gather from pinned host memory', host_memory, [dict()]),
    (
      'in 8 and 4 bits',
      quantized,
      [dict(rows=65_536, decode_batches='', rounds=30)]
      if on_cpu
      else [dict(rows=2**20, size=4096, model_dim=1024, layers=6)],
    ),
  ]
