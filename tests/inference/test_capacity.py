# SPDX-License-Identifier: Apache-2.0
"""How many slots fit, and what is said when none does."""

import pytest

from jaxsparse.config.errors import UserError
from jaxsparse.inference.capacity import slots_that_fit

GiB = 2**30


def test_slots_fill_what_is_left():
  assert slots_that_fit(100, 1.0, 20, 10, 5, 65) == 1
  assert slots_that_fit(100, 0.9, 20, 10, 5, 10) == 5
  # The published sizes with 40 GiB for caches: 96, 288 and 512 MiB each.
  assert [
    slots_that_fit(40 * GiB, 1.0, 0, 0, 0, x << 20) for x in (96, 288, 512)
  ] == [426, 142, 80]


def test_without_room_all_that_takes_it_is_named():
  with pytest.raises(UserError) as info:
    slots_that_fit(8 * GiB, 0.5, 3 * GiB, GiB // 2, GiB, 2 * GiB)
  for part in (
    '4.0 GiB of memory (50% of 8.0 GiB)',
    'weights of 3.0 GiB',
    'temporaries of 512.0 MiB',
    'prefix store of 1.0 GiB',
    'one slot of 2.0 GiB',
  ):
    assert part in str(info.value)


def test_there_may_have_to_be_room_for_two():
  assert slots_that_fit(100, 1.0, 20, 10, 5, 32, least=2) == 2
  with pytest.raises(UserError, match=r'room for .* and 2 slots of 0\.0 KiB'):
    slots_that_fit(100, 1.0, 20, 10, 5, 33, least=2)


@pytest.mark.parametrize('fraction', [0.0, 1.1, -1.0, float('nan')])
def test_fractions(fraction):
  with pytest.raises(UserError, match='memory_fraction must be above 0'):
    slots_that_fit(100, fraction, 1, 1, 1, 1)
