# SPDX-License-Identifier: Apache-2.0
"""How many slots a device has memory for."""

import math

from jaxsparse.analysis.free_memory import words
from jaxsparse.config.errors import UserError, require


def slots_that_fit(
  memory_bytes: int,
  fraction: float,
  weight_bytes: int,
  temporary_bytes: int,
  prefix_bytes: int,
  slot_bytes: int,
  least: int = 1,
) -> int:
  """Slots for which there is room beside all else; all bytes are of a device.

  Args:
    memory_bytes: that the device has in all.
    fraction: of them to be used, above 0 and at most 1.
    weight_bytes: of the parameters.
    temporary_bytes: that the program which needs most of them holds as it runs,
      by its `memory_analysis`.
    prefix_bytes: of what is kept of prompts.
    slot_bytes: of one slot's caches.
    least: slots that there must be, see `batch_rows`.

  Raises:
    UserError: not so many fit, or the fraction is none.
  """
  require(
    0 < fraction <= 1,
    f'memory_fraction must be above 0 and at most 1, got {fraction}.',
  )
  usable = math.floor(memory_bytes * fraction)
  left = usable - weight_bytes - temporary_bytes - prefix_bytes
  if left < least * slot_bytes:
    raise UserError(
      f'{words(usable)} of memory ({fraction:.0%} of {words(memory_bytes)}) '
      f'have no room for weights of {words(weight_bytes)}, temporaries of '
      f'{words(temporary_bytes)}, a prefix store of {words(prefix_bytes)} and '
      f'{"one slot" if least == 1 else f"{least} slots"} of '
      f'{words(slot_bytes)}: shorten the slots or the store, or '
      'take a smaller model.'
    )
  return left // slot_bytes
