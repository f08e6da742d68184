# SPDX-License-Identifier: Apache-2.0
"""From the address of a logical key pair to a physical slot.

Implicit value expansion (arXiv:2411.12364) gives the grid of Q x Q logical
keys E times more cells than the table has rows: a fixed bijection scatters the
logical addresses, and the result names one of E virtual blocks and one of N
slots, Q * Q = E * N. The paper draws the bijection at random and stores it. A
table of E * N integers is read at random and grows with the memory; here it is
arithmetic, a few rounds of an unbalanced Feistel network on (i, j), and a
table is only for imported checkpoints.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt

_ROUNDS = 4

AddressArray = Int[Array, '*B'] | UInt[Array, '*B']


def shuffle(address: AddressArray, num_keys: int, salt: int) -> AddressArray:
  """A pseudo-random bijection of [0, num_keys^2).

  Each round adds to one coordinate, modulo num_keys, a hash of the other: that
  can be undone, so every round and all of them are bijections for any
  num_keys. Nothing overflows: all steps are in uint32, which wraps by design
  in the hash and holds every sum of two coordinates below 2^16.

  Args:
    address: i * num_keys + j.
    num_keys: logical keys Q per axis, at most 2^16.
    salt: another salt, another bijection; give each layer its own.

  Returns:
    The virtual addresses, in the type of `address`.
  """
  side = jnp.uint32(num_keys)
  address_u32 = address.astype(jnp.uint32)
  i, j = address_u32 // side, address_u32 % side
  for step in range(_ROUNDS):
    key = (salt * _ROUNDS + step + 1) * 0x9E3779B9 % 2**32
    i, j = j, (i + _hash(j, key) % side) % side
  return (i * side + j).astype(address.dtype)


def _hash(x: UInt[Array, '*B'], key: int):
  """Mixes every bit of x and key into every bit of the result."""
  x = x * jnp.uint32(0x9E3779B1) + jnp.uint32(key)
  for multiplier in (0x85EBCA6B, 0xC2B2AE35):
    x = (x ^ (x >> 16)) * jnp.uint32(multiplier)
  return x ^ (x >> 16)


def look_up(
  address: AddressArray, permutation: Int[Array, 'V']
) -> Int[Array, '*B']:
  """The bijection of an imported checkpoint, given as its table."""
  return permutation.at[address].get(mode='promise_in_bounds')


def split(
  virtual: AddressArray, num_slots: int
) -> tuple[Int[Array, '*B'], Int[Array, '*B']]:
  """Virtual block and physical slot of a virtual address, as int32."""
  size = jnp.asarray(num_slots, virtual.dtype)
  block, slot = virtual // size, virtual % size
  return block.astype(jnp.int32), slot.astype(jnp.int32)
