# SPDX-License-Identifier: Apache-2.0
"""grouped_matmul: products with experts, as many bytes as experts are hit.

First, `rows` rows fall on 1, 2, 4, ... of the experts: the time should follow
the bytes of the distinct experts. 'to line' is the ratio to the straight line
between the first and the last point. Then one token passes `used` experts:
jaxsparse's two ways, sorted by expert and as assigned, against that many dense
products with matrices of their own.

Which experts are hit changes from call to call: matrices come from memory and
not from a cache.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.experiments.bench import measuring
from jaxsparse.experiments.bench.measuring import Contender
from jaxsparse.ops.experts.grouped_matmul import assigned_matmul, grouped_matmul

OPTIONS = dict(
  experts=64, depth=512, width=1024, rows=64, used=2, dtype='float32', rounds=7
)


def measure(options: argparse.Namespace) -> Iterator[dict]:
  yield from _measure_hits(options)
  yield from _measure_token(options)


def _measure_hits(options):
  hits = [2**i for i in range(options.experts.bit_length())]
  seconds = measuring.take_turns(
    {str(h): c for h, c in hit_contenders(options, hits).items()},
    options.rounds,
  )
  first, last = seconds['1'], seconds[str(hits[-1])]
  records = []
  for h in hits:
    line = first + (last - first) * (h - 1) / max(1, hits[-1] - 1)
    task = f'{options.rows} rows on {h} of {options.experts}'
    records.append(
      _record(task, 'grouped_matmul', seconds[str(h)], h, options.rows, options)
      | dict(to_line=seconds[str(h)] / line)
    )
  return records


def hit_contenders(
  options: argparse.Namespace, hits: Sequence[int]
) -> dict[int, Contender]:
  """The same program on rows that fall evenly on some of the experts."""
  experts, rows = _draw(options, options.rows)
  rng = np.random.default_rng(1)

  def sizes(num_hit):
    order = rng.permutation(options.experts)[:num_hit]
    share, rest = divmod(options.rows, num_hit)
    sizes = np.zeros(options.experts, np.int32)
    sizes[order] = share + (np.arange(num_hit) < rest)
    return jnp.asarray(sizes)

  return {
    h: _in_turn(
      grouped_matmul,
      [(rows, experts, sizes(h)) for _ in range(options.experts)],
    )
    for h in hits
  }


def _measure_token(options):
  seconds = measuring.take_turns(token_contenders(options), options.rounds)
  task, used = f'1 token, {options.used} experts', options.used
  return [
    _record(task, name, time, used, used, options)
    for name, time in seconds.items()
  ]


def token_contenders(options: argparse.Namespace) -> dict[str, Contender]:
  """A token's products with its experts, [used, width] each."""
  experts, rows = _draw(options, 1)
  rng = np.random.default_rng(2)
  chosen = [
    np.sort(rng.permutation(options.experts)[: options.used])
    for _ in range(options.experts)
  ]
  matrices = [jnp.asarray(matrix) for matrix in experts]

  def dense(row, *matrices):
    return jnp.concatenate([row @ matrix for matrix in matrices])

  def assigned(row, experts, expert):
    return assigned_matmul(row.repeat(len(expert), 0), experts, expert)

  def sorted_by_expert(row, experts, expert):
    sizes = jnp.bincount(expert, length=len(experts)).astype(jnp.int32)
    return grouped_matmul(row.repeat(len(expert), 0), experts, sizes)

  mine = [(rows, experts, jnp.asarray(c, jnp.int32)) for c in chosen]
  return {
    'dense products': _in_turn(
      dense, [(rows, *(matrices[i] for i in c)) for c in chosen]
    ),
    'assigned_matmul': _in_turn(assigned, mine),
    'grouped_matmul': _in_turn(sorted_by_expert, mine),
  }


def _draw(options, num_rows):
  rng = np.random.default_rng(0)
  shape = (options.experts, options.depth, options.width)
  experts = rng.standard_normal(shape, dtype=np.float32)
  rows = rng.standard_normal((num_rows, options.depth), dtype=np.float32)
  return tuple(jnp.asarray(x, options.dtype) for x in (experts, rows))


def _in_turn(function: Callable, arguments: Sequence[tuple]) -> Contender:
  """A compiled function that takes the next arguments at every call."""
  program = jax.jit(function).lower(*arguments[0]).compile()
  turns = itertools.cycle(arguments)
  temp_bytes = program.memory_analysis().temp_size_in_bytes
  return Contender(lambda: program(*next(turns)), temp_bytes=temp_bytes)


def _record(task, contender, seconds, num_hit, num_rows, options):
  num_products = num_hit * options.depth * options.width
  num_ends = num_rows * (options.depth + options.width)
  item = jnp.dtype(options.dtype).itemsize
  least_bytes = item * (num_products + num_ends)
  rate = least_bytes / seconds
  return dict(
    task=task,
    contender=contender,
    seconds=seconds,
    least_bytes=least_bytes,
    bytes_per_second=rate,
    share_of_copy=rate / measuring.copy_bandwidth(),
    temp_bytes=None,
  )


show = measuring.print_last


def summarize(records: Sequence[dict]) -> None:
  for record in records:
    if 'to_line' in record:
      print(f'{record["task"]}: {record["to_line"]:.2f} of the line')
