# SPDX-License-Identifier: Apache-2.0
"""train: training on a CPU beside a plain PyTorch model of the same sizes.

A live process for each contender, each with all cores to itself while it
works: they take turns, and only ratios count. Tokens of training a second,
then prompts and decoded tokens a second (64 tokens, 32 after them, greedy, for
1 and for 16 sequences), relative to eager PyTorch; FLOPs a second of training
as a share of what the contender's own library reaches in a square float32
product; and seconds from the start of the process to the end of its first step,
with nothing compiled before.

`tiny` is `dense:tiny` and beside it `ultramem:tiny`, whose FLOPs per token are
those of the dense model; `25m` a dense model of 25M parameters (512 wide, 8
blocks, 8 sequences of 256). PyTorch has fused AdamW, its own attention and
norms, eager and by torch.compile, which needs a C++ compiler.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from jaxsparse.config.errors import UserError, require
from jaxsparse.experiments.bench import measuring, train_sizes

OPTIONS = dict(
  # Another library, or '' for none.
  peer='torch',
  # Which of tiny and 25m, with commas between.
  sizes=','.join(train_sizes.SIZES),
  # Turns of each contender, and seconds of training in each.
  rounds=5,
  turn=3.0,
)

_PEERS = ('', 'torch')
_BATCHES = (1, 16)


class Worker:
  """A process of `train_worker`."""

  def __init__(self, contender: str, size: str):
    self.contender = contender
    command = 'jaxsparse.experiments.bench.train_worker'
    environment = os.environ | dict(
      JAX_PLATFORMS='cpu',
      # Threads that wait for work by spinning would take it from the others.
      OMP_WAIT_POLICY='passive',
    )
    start = time.perf_counter()
    self._process = subprocess.Popen(
      [sys.executable, '-m', command, contender, size],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=environment,
    )
    self._answer()
    self.start_seconds = time.perf_counter() - start

  def seconds(self, task: str, number: int) -> float:
    self._process.stdin.write(f'{task} {number}\n')
    self._process.stdin.flush()
    return self._answer()

  def close(self) -> None:
    self._process.stdin.close()
    self._process.wait()

  def _answer(self):
    line = self._process.stdout.readline()
    if not line:
      raise UserError(
        f'the process of {self.contender!r} ended with '
        f'{self._process.wait()}; what it says is above.'
      )
    return json.loads(line)


def measure(options: argparse.Namespace) -> Iterator[dict]:
  """A record of each contender at each size."""
  sizes = options.sizes.split(',')
  for size in sizes:
    require(
      size in train_sizes.SIZES,
      f'--sizes must be of {", ".join(train_sizes.SIZES)}, got {size!r}.',
    )
  require(
    options.peer in _PEERS, f"--peer must be torch or '', got {options.peer!r}."
  )
  require(
    not options.peer or measuring.has_torch(),
    "--peer=torch needs PyTorch: pip install torch, or give --peer=''.",
  )
  for size in sizes:
    yield from _measure_size(size, options)


def _measure_size(size: str, options: argparse.Namespace) -> Iterator[dict]:
  workers = []
  try:
    for contender in train_sizes.contenders(size, options.peer):
      workers.append(worker := Worker(contender, size))
      print(
        f'{size} {contender}: first step after {worker.start_seconds:.1f} s',
        flush=True,
      )
    times = _take_turns(workers, options)
  finally:
    for worker in workers:
      worker.close()
  for worker in workers:
    config = train_sizes.config_of(worker.contender, size)
    medians = {
      task: statistics.median(seconds)
      for task, seconds in times[worker.contender].items()
    }
    tokens = config.data.batch_size * config.data.seq_len
    rate = train_sizes.flops(config) * tokens / medians['train']
    yield dict(
      size=size,
      contender=worker.contender,
      start_seconds=worker.start_seconds,
      tokens_per_second=tokens / medians['train'],
      share_of_matmul=rate / (2 * 1024**3 / medians['matmul']),
      seconds=medians,
    )


def _take_turns(workers, options):
  """Seconds of each task of each worker, a list with one of each turn."""
  num_steps, times = {}, {}
  for worker in workers:
    seconds = worker.seconds('train', 3) / 3
    num_steps[worker.contender] = max(1, round(options.turn / seconds))
    worker.seconds('matmul', 1)
    for batch in _BATCHES:
      worker.seconds('prefill', batch)
      worker.seconds('decode', batch)
    times[worker.contender] = {}
  for _ in range(options.rounds):
    for worker in workers:
      count = num_steps[worker.contender]
      taken = dict(
        train=worker.seconds('train', count) / count,
        matmul=worker.seconds('matmul', 30) / 30,
      )
      for task in ('prefill', 'decode'):
        for batch in _BATCHES:
          taken[f'{task} {batch}'] = min(
            worker.seconds(task, batch) for _ in range(3)
          )
      for task, seconds in taken.items():
        times[worker.contender].setdefault(task, []).append(seconds)
  return times


def show(records: list[dict]) -> None:
  """The last one's line; ratios are to the first contender of its size."""
  record = records[-1]
  first = next(r for r in records if r['size'] == record['size'])
  tasks = [t for t in record['seconds'] if t != 'matmul']
  if record is first:
    print(
      f'{"size":<6}{"contender":<20}{"tokens/s":>10}'
      + ''.join(f'{task:>12}' for task in tasks)
      + f'{"of matmul":>11}{"first step":>12}'
    )
  ratios = [first['seconds'][t] / record['seconds'][t] for t in tasks]
  print(
    f'{record["size"]:<6}{record["contender"]:<20}'
    f'{record["tokens_per_second"]:>10,.0f}'
    + ''.join(f'{ratio:>11.2f}x' for ratio in ratios)
    + f'{record["share_of_matmul"]:>11.0%}{record["start_seconds"]:>10.1f} s'
  )
