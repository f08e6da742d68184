# SPDX-License-Identifier: Apache-2.0
"""value_bag: pooling rows of a table, forward and with both gradients.

Contenders of the forward pass: jaxsparse, the obvious `einsum` over gathered
rows, and PyTorch's `embedding_bag` where it is installed and no pools, cores
or narrow types are asked for. With gradients, those of the weights and a dense
one of the table, jaxsparse takes part with every way to add that up.

Slots are drawn evenly. The least traffic of a pass reads each distinct row
once, as all repeats could be served by a cache.
"""

import argparse
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config.errors import require_choice
from jaxsparse.config.tables import TABLE_TYPES
from jaxsparse.experiments.bench import measuring
from jaxsparse.experiments.bench.measuring import Contender
from jaxsparse.ops.memory.value_bag import value_bag
from jaxsparse.ops.memory.value_bag_gradient import ACCUMULATION_MODES

OPTIONS = dict(
  rows=262_144, width=256, tokens=4096, entries=32, cores=1, pools=1,
  # Of the table.
  dtype='float32', rounds=7,
)  # fmt: skip


def measure(options: argparse.Namespace) -> Iterator[dict]:
  arrays = _draw(options)
  require_choice(options, 'dtype', TABLE_TYPES)
  task = f'T={options.tokens} k={options.entries} W={options.width}'
  task += '' if options.dtype == 'float32' else f' {options.dtype}'
  forward, backward = contenders(options, arrays)
  forward_bytes, backward_bytes = least_bytes(arrays)
  rounds = options.rounds
  yield from measuring.compare(
    f'forward {task}', forward, rounds, forward_bytes
  )
  yield from measuring.compare(
    f'gradients {task}', backward, rounds, backward_bytes
  )


def _draw(options: argparse.Namespace) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  shape = (options.tokens, options.entries)
  size = (options.rows, options.width)
  return dict(
    table=rng.standard_normal(size, dtype=np.float32).astype(
      jnp.dtype(options.dtype)
    ),
    slot=rng.integers(0, options.rows, shape, dtype=np.int32),
    weight=rng.standard_normal((*shape, options.cores), dtype=np.float32),
    pool=rng.integers(0, options.pools, shape, dtype=np.int32),
    cotangent=rng.standard_normal(
      (options.tokens, options.pools, options.width), dtype=np.float32
    ),
  )


def least_bytes(arrays: dict[str, np.ndarray]) -> tuple[int, int]:
  """Bytes that the forward pass, and one with gradients, has to move."""
  row_bytes = arrays['table'][0].nbytes
  rows = len(np.unique(arrays['slot'])) * row_bytes
  index = arrays['slot'].nbytes + arrays['weight'].nbytes
  if arrays['cotangent'].shape[1] > 1:
    index += arrays['pool'].nbytes
  pooled = arrays['cotangent'].nbytes
  forward = rows + index + pooled
  # The rows again for the weights' gradient; the table's is written once.
  weights = rows + index + pooled + arrays['weight'].nbytes
  return forward, forward + weights + arrays['table'].nbytes


def contenders(
  options: argparse.Namespace, arrays: dict[str, np.ndarray]
) -> tuple[dict[str, Contender], dict[str, Contender]]:
  """The forward pass and that with gradients, by contender."""
  args = {name: jnp.asarray(array) for name, array in arrays.items()}
  cotangent, pool = args.pop('cotangent'), args.pop('pool')
  pool = pool if options.pools > 1 else None

  def bag(table, slot, weight, way='scatter'):
    return value_bag(
      table, slot, weight, pool, options.pools, table_gradient=way
    )

  def einsum(table, slot, weight):
    return einsum_bag(table, slot, weight, pool, options.pools)

  forward = {
    'jaxsparse': measuring.compiled(bag, *args.values()),
    'einsum': measuring.compiled(einsum, *args.values()),
  }

  def with_gradients(function, **keywords):
    def run(table, slot, weight, cotangent):
      pooled, vjp = jax.vjp(
        lambda t, w: function(t, slot, w, **keywords), table, weight
      )
      return pooled, *vjp(cotangent.astype(pooled.dtype))

    return measuring.compiled(run, *args.values(), cotangent)

  backward = {
    f'jaxsparse, {w}': with_gradients(bag, way=w) for w in ACCUMULATION_MODES
  }
  backward['einsum'] = with_gradients(einsum)
  has_peer = measuring.has_torch() and options.dtype == 'float32'
  if has_peer and options.pools == options.cores == 1:
    name = 'torch embedding_bag'
    forward[name], backward[name] = _torch_contenders(arrays)
  return forward, backward


def einsum_bag(table, slot, weight, pool, num_pools):
  """The bag as one would first write it."""
  num_tokens, width = len(slot), table.shape[1]
  if weight.shape[2] == num_pools == 1:
    pooled = jnp.einsum('tk,tkw->tw', weight[..., 0], table[slot])
    return pooled[:, None]
  rows = table[slot].reshape(*slot.shape, weight.shape[2], -1)
  if num_pools == 1:
    pooled = jnp.einsum('tkc,tkcw->tcw', weight, rows)
  else:
    one_hot = jax.nn.one_hot(pool, num_pools)
    pooled = jnp.einsum('tkc,tkg,tkcw->tgcw', weight, one_hot, rows)
  return pooled.reshape(num_tokens, num_pools, width)


def _torch_contenders(arrays):
  import torch

  device = measuring.torch_device()
  table, slot, weight, cotangent = (
    torch.tensor(arrays[name], device=device)
    for name in ('table', 'slot', 'weight', 'cotangent')
  )
  slot, weight = slot.long(), weight[..., 0].contiguous()
  cotangent = cotangent[:, 0].contiguous()

  def pool_rows(table, weight):
    return torch.nn.functional.embedding_bag(
      slot, table, mode='sum', per_sample_weights=weight
    )

  def with_gradients():
    leaves = [x.detach().requires_grad_() for x in (table, weight)]
    pooled = pool_rows(*leaves)
    return pooled, *torch.autograd.grad(pooled, leaves, cotangent)

  return (
    measuring.by_torch(lambda: pool_rows(table, weight)),
    measuring.by_torch(with_gradients),
  )


show = measuring.print_last
