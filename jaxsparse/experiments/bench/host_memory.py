# SPDX-License-Identifier: Apache-2.0
"""host_memory: reading rows of a table that lies in the host's memory.

A gather in a GPU's program can read pinned host memory directly, row by row,
without a copy of the table on the device (see `lax.gather` on an operand whose
memory kind is `pinned_host`). Its ceiling is the link between the two. Other
backends have no such read, and there the bench says so instead.
"""

import argparse

import jax

from jaxsparse.experiments.bench import measuring

OPTIONS = dict(rows=262_144, width=1024, references=8192, rounds=7)


def measure(options: argparse.Namespace) -> list[dict]:
  if jax.default_backend() != 'gpu':
    print('gather from pinned host memory: only a GPU can do that')
    return []
  task = f'gather of {options.references} rows, W={options.width}'
  row_bytes = 4 * options.width
  return measuring.compare(
    task,
    contenders(options),
    options.rounds,
    2 * options.references * row_bytes,
  )


def contenders(
  options: argparse.Namespace,
) -> dict[str, measuring.Contender]:
  device = jax.devices()[0]
  key = jax.random.key(0)
  table = jax.random.normal(key, (options.rows, options.width))
  slot = jax.random.randint(key, (options.references,), 0, options.rows)

  def gather(table, slot):
    return table.at[slot].get(mode='promise_in_bounds')

  def from_memory(kind):
    place = jax.sharding.SingleDeviceSharding(device, memory_kind=kind)
    return measuring.compiled(gather, jax.device_put(table, place), slot)

  return {
    'device': from_memory('device'),
    'pinned host': from_memory('pinned_host'),
  }


show = measuring.print_last
