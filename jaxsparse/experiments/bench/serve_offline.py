# SPDX-License-Identifier: Apache-2.0
"""The same model without a server: what the figures of one are relative to."""

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from jaxsparse.data.tokenizer import load_from_workdir
from jaxsparse.experiments.bench.load import Question
from jaxsparse.inference import weights
from jaxsparse.inference.decoding import generate_tokens
from jaxsparse.inference.jobs import JobSampling
from jaxsparse.inference.sampling import Sampling
from jaxsparse.inference.slot_programs import Programs
from jaxsparse.run import run_config

_GREEDY = JobSampling(temperature=0.0)


class Offline:
  """A workdir's model in this process.

  Args:
    workdir: of a training run.
    num_slots: sequences at once.
    length: tokens of each.
    chunk: tokens of a prompt that are read at once.
  """

  def __init__(self, workdir: str, num_slots: int, length: int, chunk: int):
    self._config = run_config.read(workdir, lambda text: None).model
    self._stop_ids = load_from_workdir(workdir).stop_ids
    self.num_slots, self._length, self._chunk = num_slots, length, chunk
    _, self._params = weights.load(workdir, self._config, is_folded=True)
    self._programs: Programs | None = None

  def batches(self, questions: Sequence[Question]) -> float:
    """Seconds of static batching: each batch until its longest answer."""
    start = time.perf_counter()
    for begin in range(0, len(questions), self.num_slots):
      batch = questions[begin : begin + self.num_slots]
      for _ in generate_tokens(
        self._config,
        self._params,
        [q.prompt for q in batch],
        max(q.max_tokens for q in batch),
        Sampling(temperature=0.0),
      ):
        pass
    return time.perf_counter() - start

  def step(self, num_steps: int) -> float:
    """Median seconds of a decode step of full slots, its tokens fetched."""
    programs = self._ready()
    every = np.ones(self.num_slots, np.bool_)
    return _median(lambda: programs.decode(every).result(), num_steps)

  def chunk(self, num_chunks: int) -> float:
    """Median seconds of the program that reads a chunk, its token fetched."""
    programs = self._ready()
    tokens = [65] * programs.chunks[0]

    def read() -> None:
      programs.start(0, _GREEDY)
      programs.prefill(0, tokens, is_last=True).result()

    return _median(read, num_chunks)

  def _ready(self) -> Programs:
    if self._programs is None:
      self._programs = Programs.compile(
        self._config,
        self._params,
        self.num_slots,
        self._length,
        chunks=(self._chunk,),
        stop_ids=self._stop_ids,
      )
    for slot in range(self.num_slots):
      self._programs.start(slot, _GREEDY)
      self._programs.prefill(slot, [65], is_last=True).result()
    return self._programs


def _median(run: Callable[[], object], number: int) -> float:
  times = []
  for _ in range(number + 1):
    start = time.perf_counter()
    run()
    times.append(time.perf_counter() - start)
  return statistics.median(times[1:])
