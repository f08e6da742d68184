# SPDX-License-Identifier: Apache-2.0
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse.ops.memory import addressing

# Compiled as a whole: op by op takes seconds.
shuffle = jax.jit(addressing.shuffle, static_argnums=(1, 2))
split = jax.jit(addressing.split, static_argnums=1)

GRIDS = [1, 2, 3, 16, 37, 255, 1000]


@pytest.mark.parametrize(
  ('num_keys', 'salt'),
  few(
    [*((num_keys, 0) for num_keys in GRIDS), (16, 7), (37, 7)],
    itertools.product(GRIDS, [0, 7]),
  ),
)
def test_is_a_bijection(num_keys, salt):
  address = np.arange(num_keys**2, dtype=np.int32)
  virtual = np.asarray(shuffle(address, num_keys, salt))
  np.testing.assert_array_equal(np.sort(virtual), address)


@pytest.mark.parametrize('num_keys', [46340, 46341, 65535, 65536])
def test_large_grids_do_not_overflow(num_keys):
  rng = np.random.default_rng(0)
  address = np.unique(
    rng.integers(0, num_keys**2, 100_000, dtype=np.int64)
  ).astype(np.uint32)
  address = np.concatenate([address, np.array([num_keys**2 - 1], np.uint32)])
  virtual = np.asarray(shuffle(address, num_keys, 3)).astype(np.int64)
  assert len(np.unique(virtual)) == len(np.unique(address))
  assert virtual.min() >= 0
  assert virtual.max() < num_keys**2
  # All of the range is in use.
  counts = np.histogram(virtual, bins=64, range=(0, num_keys**2))[0]
  assert counts.min() > 0.8 * len(address) / 64


def test_neighbours_spread_over_blocks_and_slots():
  num_keys, expansion = 64, 4
  num_slots = num_keys**2 // expansion
  virtual = shuffle(np.arange(num_keys**2, dtype=np.int32), num_keys, 0)
  block, slot = (np.asarray(x) for x in split(virtual, num_slots))
  assert set(block) == set(range(expansion))
  # A row of the grid, and a column of it, meets all blocks about equally.
  grid = block.reshape(num_keys, num_keys)
  for line in [*grid, *grid.T]:
    counts = np.bincount(line, minlength=expansion)
    assert counts.min() >= 4, counts
  # Neighbours are as often in one block as chance says: no pattern.
  assert abs(np.mean(grid[:, 1:] == grid[:, :-1]) - 1 / expansion) < 0.05
  assert abs(np.mean(grid[1:] == grid[:-1]) - 1 / expansion) < 0.05
  steps = np.diff(slot.astype(np.int64)) % num_slots
  assert len(np.unique(steps)) > num_slots / 2


def test_square_of_candidates_collides_as_a_random_bijection_does():
  """Kept cells share rows and columns; their slots must not care."""
  num_keys, num_slots = 256, 256**2 // 4
  rng = np.random.default_rng(0)
  ours, chance = [], []
  for _ in range(40):
    i, j = (rng.choice(num_keys, 30, replace=False) for _ in range(2))
    address = (i[:, None] * num_keys + j).reshape(-1).astype(np.int32)
    slot = split(shuffle(address, num_keys, 5), num_slots)[1]
    ours.append(len(np.unique(slot)))
    random = rng.choice(num_keys**2, len(address), replace=False)
    chance.append(len(np.unique(random % num_slots)))
  assert abs(np.mean(ours) - np.mean(chance)) < 4


def test_salts_give_different_bijections():
  address = np.arange(4096, dtype=np.int32)
  first, second = (np.asarray(shuffle(address, 64, salt)) for salt in (0, 1))
  assert (first == second).mean() < 0.01


def test_split_and_table_form():
  permutation = np.random.default_rng(0).permutation(12).astype(np.int32)
  address = np.array([[0, 5], [11, 3]], np.int32)
  virtual = np.asarray(jax.jit(addressing.look_up)(address, permutation))
  np.testing.assert_array_equal(virtual, permutation[address])
  block, slot = map(np.asarray, split(virtual, 3))
  np.testing.assert_array_equal(block * 3 + slot, virtual)
  assert block.max() < 4
  assert block.dtype == slot.dtype == jnp.int32


def test_runs_under_jit_with_the_same_result():
  address = jnp.arange(100, dtype=jnp.int32)
  by_op = addressing.shuffle(address, 10, 2)
  np.testing.assert_array_equal(shuffle(address, 10, 2), by_op)
