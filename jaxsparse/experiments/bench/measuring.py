# SPDX-License-Identifier: Apache-2.0
"""What all benches share: the machine, taking turns, least traffic, tables.

Contenders take turns, round by round, another first in each, so that what else
the machine does falls on all of them; the tables show medians. Where it is
known how many bytes a task must move at least, its score is their rate as a
share of the rate of a copy, measured in the same process: 100 % cannot be
beaten by much.
"""

import concurrent.futures
import dataclasses
import functools
import importlib.metadata
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# A round calls a contender as often as takes this long, in seconds.
_SHORTEST_ROUND = 0.01


@dataclasses.dataclass(frozen=True)
class Contender:
  """One way to do a task: what starts it, and what waits for its result."""

  run: Callable[[], Any]
  wait: Callable[[Any], Any] = jax.block_until_ready
  # Temporaries of the compiled program.
  temp_bytes: int | None = None


def compiled(function: Callable, *args, **jit_options) -> Contender:
  """`function(*args)` by JAX, compiled ahead of the first call."""
  program = jax.jit(function, **jit_options).lower(*args).compile()
  temp_bytes = program.memory_analysis().temp_size_in_bytes
  return Contender(lambda: program(*args), temp_bytes=temp_bytes)


def in_threads(
  function: Callable, arguments: Mapping[str, Any]
) -> dict[str, Any]:
  """`function` of each argument, in threads: compiling leaves Python free."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    results = pool.map(function, arguments.values())
    return dict(zip(arguments, results, strict=True))


def by_torch(run: Callable[[], Any]) -> Contender:
  """A contender in PyTorch, on a GPU where JAX is on one."""
  import torch

  if torch_device() == 'cpu':
    return Contender(run, lambda result: result)
  return Contender(run, lambda result: torch.cuda.synchronize())


def has_torch() -> bool:
  return bool(importlib.util.find_spec('torch'))


def torch_device() -> str:
  """Where PyTorch should compute to be compared with JAX."""
  import torch

  on_gpu = jax.default_backend() == 'gpu' and torch.cuda.is_available()
  return 'cuda' if on_gpu else 'cpu'


def take_turns(
  contenders: Mapping[str, Contender],
  num_rounds: int,
  least: bool = False,
) -> dict[str, float]:
  """Median seconds of each contender's call over `num_rounds` rounds.

  With `least`, those of the fastest call, each call being a round: what a busy
  machine does besides only adds time.
  """
  of_rounds = min if least else statistics.median
  times = _rounds(contenders, num_rounds, least)
  return {name: of_rounds(t) for name, t in times.items()}


def _rounds(
  contenders: Mapping[str, Contender], num_rounds: int, has_one_call: bool
) -> dict[str, list[float]]:
  """Seconds of each contender's call in every round."""
  calls = {}
  for name, contender in contenders.items():
    contender.wait(contender.run())
    seconds = _seconds(contender, 1)
    is_one = has_one_call or seconds > _SHORTEST_ROUND
    calls[name] = 1 if is_one else round(_SHORTEST_ROUND / seconds)
  times = {name: [] for name in contenders}
  names = list(contenders)
  for i in range(num_rounds):
    first = i % len(names)
    for name in names[first:] + names[:first]:
      times[name].append(_seconds(contenders[name], calls[name]))
  return times


def _seconds(contender: Contender, num_calls: int) -> float:
  start = time.perf_counter()
  for _ in range(num_calls):
    result = contender.run()
  contender.wait(result)
  return (time.perf_counter() - start) / num_calls


@functools.cache
def copy_bandwidth() -> float:
  """Bytes read and written per second by a copy of 256 MB; 4 GB on a GPU.

  It writes over a buffer in use: an operating system takes longer to hand out
  pages than a copy takes to fill them.
  """
  size = 2**26 if jax.default_backend() == 'cpu' else 2**30
  x, written = jnp.ones(size, jnp.float32), jnp.zeros(size, jnp.float32)
  copy = jax.jit(lambda x, _: x + 1, donate_argnums=1, keep_unused=True)
  copy = copy.lower(x, written).compile()

  def run():
    nonlocal written
    written = copy(x, written)
    return written

  return 2 * x.nbytes / take_turns({'copy': Contender(run)}, 5)['copy']


@functools.cache
def matmul_rate() -> tuple[float, str]:
  """FLOPs per second of a square matmul, and its type."""
  on_cpu = jax.default_backend() == 'cpu'
  size, dtype = (1024, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
  x = jnp.ones((size, size), dtype)
  matmul = compiled(jnp.matmul, x, x)
  seconds = take_turns({'matmul': matmul}, 5)['matmul']
  return 2 * size**3 / seconds, jnp.dtype(dtype).name


def describe_machine() -> list[str]:
  """Device, versions and its two rates: the first lines of every bench."""
  device = jax.devices()[0]
  names = [n for n in ('jax', 'jaxlib', 'torch') if importlib.util.find_spec(n)]
  versions = ', '.join(f'{n} {importlib.metadata.version(n)}' for n in names)
  flops, dtype = matmul_rate()
  return [
    f'device: {device.device_kind} ({device.platform}, {len(jax.devices())})',
    f'versions: python {sys.version.split()[0]}, {versions}',
    f'copy bandwidth: {copy_bandwidth() / 1e9:.1f} GB/s',
    f'matmul rate: {flops / 1e9:.0f} GFLOP/s in {dtype}',
  ]


def compare(
  task: str,
  contenders: Mapping[str, Contender],
  num_rounds: int,
  least_bytes: int | None = None,
  least: bool = False,
) -> list[dict]:
  """Runs a task's contenders against each other: a record for each.

  With `least`, their seconds are those of the fastest call, and the record has
  the 'median_seconds', too.
  """
  times = _rounds(contenders, num_rounds, least)
  medians = {name: statistics.median(t) for name, t in times.items()}
  seconds = {n: min(t) for n, t in times.items()} if least else medians
  records = []
  for name, contender in contenders.items():
    record = dict(task=task, contender=name, seconds=seconds[name])
    if least:
      record['median_seconds'] = medians[name]
    if least_bytes is not None:
      rate = least_bytes / seconds[name]
      record |= dict(
        least_bytes=least_bytes,
        bytes_per_second=rate,
        share_of_copy=rate / copy_bandwidth(),
      )
    record['temp_bytes'] = contender.temp_bytes
    records.append(record)
  return records


def print_last(records: Sequence[dict]) -> None:
  """The last one's line; the ratio is to the first contender of its task."""
  if len(records) == 1:
    print(
      f'{"task":<36}{"contender":<26}{"time":>12}{"ratio":>8}{"least":>10}'
      f'{"rate":>11}{"of copy":>9}{"temporaries":>13}'
    )
  r = records[-1]
  base = next(x['seconds'] for x in records if x['task'] == r['task'])
  line = f'{r["task"]:<36}{r["contender"]:<26}'
  line += f'{r["seconds"] * 1e3:>9.3f} ms{r["seconds"] / base:>7.2f}x'
  if 'least_bytes' in r:
    line += f'{r["least_bytes"] / 1e6:>7.0f} MB'
    line += f'{r["bytes_per_second"] / 1e9:>6.1f} GB/s'
    line += f'{r["share_of_copy"]:>9.0%}'
  else:
    line += ' ' * 30
  temp = r['temp_bytes']
  print(line + ('' if temp is None else f'{temp / 1e6:>10.0f} MB'))
