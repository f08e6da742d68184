# SPDX-License-Identifier: Apache-2.0
"""What the processes of one run agree on; trivial with a single process."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxsparse.config.errors import UserError


def is_process_zero() -> bool:
  """Whether this is process 0, which prints and writes for all."""
  return jax.process_index() == 0


def wait_for_all(what: str) -> None:
  """Returns when every process has come to the point named `what`."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def process_zero_first() -> Iterator[None]:
  """Process 0 runs the block before all others, which find what it made.

  Raises:
    UserError: in every process, if one process failed in the block.
  """
  if not is_process_zero():
    _end_with_the_others(None)
  error = None
  try:
    yield
  except Exception as caught:
    error = caught
  _end_with_the_others(error)
  if is_process_zero():
    _end_with_the_others(None)


def _end_with_the_others(error: Exception | None) -> None:
  """Raises this process's error, or says that another process has one."""
  if jax.process_count() == 1:
    if error is not None:
      raise error
    return
  sentence = ''
  if error is not None:
    is_sentence = isinstance(error, UserError)
    sentence = str(error) if is_sentence else f'{type(error).__name__}: {error}'
  sentences = gather(sentence)
  if error is not None:
    raise error
  for index, sentence in enumerate(sentences):
    if sentence:
      raise UserError(f'process {index} of {len(sentences)}: {sentence}')


def gather(value: Any) -> list[Any]:
  """What every process has as `value`, anything JSON can hold, in order."""
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array([len(text)]))
  # A power of two: each size compiles a program of its own.
  padded = np.zeros(1 << (int(lengths.max()) - 1).bit_length(), np.uint8)
  padded[: len(text)] = text
  rows = multihost_utils.process_allgather(padded)
  return [
    json.loads(row[:length].tobytes())
    for row, length in zip(rows, lengths.ravel(), strict=True)
  ]


def any_of_all(value: bool) -> bool:
  """Whether `value` holds in at least one process."""
  if jax.process_count() == 1:
    return value
  return bool(multihost_utils.process_allgather(np.array([value])).any())
