# SPDX-License-Identifier: Apache-2.0
"""Which beginnings of prompts are kept, found and dropped."""

import dataclasses
import random

import pytest

from jaxsparse.inference import prefix_store
from jaxsparse.inference.prefix_store import PrefixStore


@dataclasses.dataclass(eq=False)
class Part:
  num_bytes: int


class Snapshot:
  def __init__(self, length, num_bytes=10, shared=()):
    self.length, self.parts = length, (*shared, Part(num_bytes))


def fill(store, tokens, salt=''):
  """Reads a prompt as an engine would; returns where it began."""
  found = store.find(tokens, salt)
  begin = found.length if found else 0
  for length in sorted(store.worth_keeping(tokens, salt)):
    if length > begin:
      store.keep(tokens, salt, Snapshot(length))
  return begin


def test_the_same_prompt_begins_at_its_last_whole_chunk():
  store, tokens = PrefixStore(4, 100), tuple(range(13))
  assert [fill(store, tokens) for _ in range(2)] == [0, 12]
  # A token is left to read, which the first one is drawn after.
  assert store.find(tokens[:12], '') is None
  assert fill(store, (*tokens, 7, 7, 7, 7)) == 12


def test_what_two_prompts_have_in_common_helps_the_third():
  store, common = PrefixStore(4, 1000), (1,) * 8
  begins = [fill(store, common + (x,) * 9) for x in (2, 3, 4)]
  assert begins == [0, 0, 8]


def test_another_token_salt_or_model_finds_nothing():
  store, tokens = PrefixStore(4, 100, 'step 1'), tuple(range(9))
  fill(store, tokens, 'a')
  assert store.find(tokens, 'a').length == 8
  assert store.find(tokens, '') is None
  for place in range(8):
    other = list(tokens)
    other[place] = 99
    found = store.find(other, 'a')
    assert found is None
  second = PrefixStore(4, 100, 'step 2')
  assert second._hashes(tokens, 'a') != store._hashes(tokens, 'a')


def test_tokens_are_compared_though_hashes_agree(monkeypatch):
  store, tokens = PrefixStore(4, 100), tuple(range(9))

  def same(self, tokens, salt):
    return [b'x'] * ((len(tokens) - 1) // 4)

  monkeypatch.setattr(PrefixStore, '_hashes', same)
  store.keep(tokens, '', Snapshot(8))
  assert store.find(tokens, '').length == 8
  assert store.find((5, *tokens[1:]), '') is None


def test_bytes_are_bounded_and_what_was_used_last_stays():
  store, rng = PrefixStore(4, 55), random.Random(0)
  hot = (0,) * 9
  fill(store, hot)
  for number in range(1, 300):
    size = rng.choice([10, 20, 55, 56])
    tokens = (number,) * 9
    if size < 55:
      assert store.find(hot, '')
      store.keep(tokens, '', Snapshot(8, size))
    elif size == 56:
      # No room for it at all: nothing is lost for it.
      store.keep(tokens, '', Snapshot(8, size))
      assert store.find(tokens, '') is None
    assert store.num_bytes <= 55
    held = sum(x.parts[0].num_bytes for _, x in store._kept.values())
    assert held == store.num_bytes
  store.keep(hot, '', Snapshot(8, 55))
  assert (len(store), store.num_bytes) == (1, 55)


def test_what_snapshots_share_counts_once():
  store, first, second = PrefixStore(4, 100), Part(60), Part(20)
  store.keep((1,) * 9, '', Snapshot(8, 5, [first, first]))
  assert store.num_bytes == 65
  store.keep((1,) * 13, '', Snapshot(12, 5, [first, second]))
  assert (len(store), store.num_bytes) == (2, 90)
  # The first one goes for it, but what the second one shares stays.
  store.keep((2,) * 9, '', Snapshot(8, 15))
  assert (len(store), store.num_bytes) == (2, 100)
  assert store.find((1,) * 9, '') is None
  store.keep((3,) * 9, '', Snapshot(8, 85))
  assert (len(store), store.num_bytes) == (2, 100)
  assert store._uses.total() == 2


def test_without_room_nothing_is_done():
  store, tokens = PrefixStore(4, 0), (1,) * 9
  assert store.worth_keeping(tokens, '') == frozenset()
  assert store.find(tokens, '') is None


def test_what_is_known_is_bounded(monkeypatch):
  monkeypatch.setattr(prefix_store, '_MOST_KNOWN', 5)
  store = PrefixStore(4, 100)
  for number in range(50):
    fill(store, (number,) * 9)
  assert len(store._known) == 5


@pytest.mark.parametrize('length', [1, 3, 4, 5, 8, 9])
def test_hashes_are_of_whole_chunks_before_the_last_token(length):
  assert len(PrefixStore(4, 1)._hashes((1,) * length, '')) == (length - 1) // 4
