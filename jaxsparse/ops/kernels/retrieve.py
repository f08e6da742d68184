# SPDX-License-Identifier: Apache-2.0
"""The slots that a memory layer with a Tucker core reads, in one Triton kernel.

From scores of keys to scores and slots of kept cells: XLA makes a dozen kernels
of it, each of a few microseconds, for what fits in one program's registers.
Each program has one head of one token: it merges each axis's ranks, keeps the m
best keys of both, scores their m x m cells, keeps the best, scores them by all
cores and shuffles their addresses.

Letters: T tokens, P memory heads, Q keys per axis, r ranks, c cores, k cells
that a head keeps, as many as candidates of an axis.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.ops.kernels import bits, probe
from jaxsparse.ops.memory import addressing
from jaxsparse.ops.memory.tucker import Directions, tucker_top_m

# Candidates, keys or cells, up to which their scores stay in registers.
_MOST_CANDIDATES = 2**14
_WARPS = 8

Cells = tuple[Float[Array, 'T P k c'], Int[Array, 'T Pk'], Int[Array, 'T Pk']]

# What a call is traced for, by name.
Options = tuple[tuple[str, int], ...]


def unsupported_reason(
  scores: Float[Array, '2 r_parts T P Q'],
  cores: Float[Array, 'c P r r'],
  directions: Directions,
  factor: Float[Array, 'T 2'] | None,
  num_selected: int,
  **options: int,
) -> str | None:
  """What keeps the kernel from serving such a call here, in words."""
  if scores.dtype != jnp.float32:
    return f'it takes f32 and not {scores.dtype}'
  cells = pl.next_power_of_2(num_selected) ** 2
  for name, number in (('keys', scores.shape[-1]), ('cells', cells)):
    if number > _MOST_CANDIDATES:
      return f'{number} {name} are more than {_MOST_CANDIDATES}'
  arrays = scores, cores, directions, factor
  return probe.unsupported_reason(
    retrieve, *arrays, num_selected=num_selected, **options
  )


def retrieve(
  scores: Float[Array, '2 r_parts T P Q'],
  cores: Float[Array, 'c P r r'],
  directions: Directions,
  factor: Float[Array, 'T 2'] | None,
  num_selected: int,
  *,
  num_slots: int,
  salt: int = 0,
  interpret: bool = False,
) -> Cells:
  """`retrieve_reference` on a GPU, cells in any order.

  A gradient is that of the reference, which then runs in its place.

  Args:
    scores: f32 rank scores of all row keys and all column keys; several parts
      of a rank, one after the other, are added up.
    cores: see `tucker_top_m`.
    directions: likewise.
    factor: a positive factor of all scores of a token's row and column keys, as
      of a query's norm; None for none.
    num_selected: likewise, k.
    num_slots: rows that the addresses are split over.
    salt: picks the bijection of addresses, see `addressing`.
    interpret: run in Pallas interpret mode (tests).

  Returns:
    The c scores of each kept cell; its slot and its virtual block.
  """
  options = tuple(
    dict(num_selected=num_selected, num_slots=num_slots, salt=salt).items()
  )
  return _retrieve(options, interpret, scores, cores, directions, factor)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _retrieve(
  options: Options,
  interpret: bool,
  scores: Float[Array, '2 r_parts T P Q'],
  cores: Float[Array, 'c P r r'],
  directions: Directions,
  factor: Float[Array, 'T 2'] | None,
):
  return _by_kernel(
    scores, cores, directions, factor, interpret=interpret, **dict(options)
  )


def _forward(options: Options, interpret: bool, *arrays: Any):
  def reference(*arrays: Any):
    found, *slots = retrieve_reference(*arrays, **dict(options))
    return found, slots

  found, pull, slots = jax.vjp(reference, *arrays, has_aux=True)
  return (found, *slots), pull


def _backward(
  options: Options, interpret: bool, pull: Callable, cotangents: tuple
):
  return pull(cotangents[0])


_retrieve.defvjp(_forward, _backward)


def _by_kernel(
  scores: Float[Array, '2 r_parts T P Q'],
  cores: Float[Array, 'c P r r'],
  directions: Directions,
  factor: Float[Array, 'T 2'] | None,
  num_selected: int,
  num_slots: int,
  salt: int,
  interpret: bool,
):
  _, ranks_by_part, num_tokens, num_heads, num_keys = scores.shape
  num_cores, _, num_ranks, _ = cores.shape
  num_parts = ranks_by_part // num_ranks
  side = pl.next_power_of_2(num_selected)
  padded = pl.next_power_of_2(num_keys)

  def kernel(
    scores_ref: jax.Ref,
    core_ref: jax.Ref,
    left_ref: jax.Ref,
    right_ref: jax.Ref,
    factor_ref: jax.Ref | None,
    found: jax.Ref,
    found_slot: jax.Ref,
    found_block: jax.Ref,
    keys: jax.Ref,
    cells: jax.Ref,
  ):
    t, p = pl.program_id(0), pl.program_id(1)
    lane = jnp.arange(side)
    # Lanes beyond the last cell repeat it.
    place = jnp.minimum(lane, num_selected - 1)
    is_cell = (lane[:, None] < num_selected) & (lane[None] < num_selected)

    def rank_scores(
      axis: int,
      rank: int,
      at: Int[Array, 'n'],
      mask: Bool[Array, 'n'] | None = None,
    ):
      other = None if mask is None else 0
      total = sum(
        triton.load(
          scores_ref.at[axis, rank * num_parts + part, t, p, at],
          mask=mask,
          other=other,
        )
        for part in range(num_parts)
      )
      return total if factor_ref is None else total * factor_ref[t, axis]

    def best(order: jax.Array, scratch: jax.Ref, *where: jax.Array | int):
      """Positions of the largest, in their order; through memory."""
      is_kept, at = bits.best_places(order, num_selected)
      # A spare place for the others, which interpreted would undo a store.
      at = jnp.where(is_kept, at, num_selected)
      positions = jnp.arange(len(order), dtype=jnp.int32)
      triton.store(scratch.at[*where, at], positions, mask=is_kept)
      if not interpret:
        triton.debug_barrier()
      return triton.load(scratch.at[*where, place])

    def candidates(axis: int, direction: jax.Ref):
      at = jnp.arange(padded)
      is_key = at < num_keys
      merged = sum(
        rank_scores(axis, rank, at, is_key) * direction[p, rank]
        for rank in range(num_ranks)
      )
      order = jnp.where(is_key, bits.ordered(merged), 0)
      return best(order, keys, t, p, axis)

    def by_rank(axis: int, at: Int[Array, 'k']):
      return [rank_scores(axis, rank, at) for rank in range(num_ranks)]

    core = [
      [
        [core_ref[c, p, a, b] for b in range(num_ranks)]
        for a in range(num_ranks)
      ]
      for c in range(num_cores)
    ]

    i, j = candidates(0, left_ref), candidates(1, right_ref)
    row, column = by_rank(0, i), by_rank(1, j)
    grid = jnp.zeros((side, side), jnp.float32)
    for b in range(num_ranks):
      left = sum(
        row[a] * sum(core[c][a][b] for c in range(num_cores))
        for a in range(num_ranks)
      )
      grid += left[:, None] * column[b][None]
    order = jnp.where(is_cell, bits.ordered(grid), 0).reshape(-1)
    cell = best(order, cells, t, p)
    i, j = (
      triton.load(keys.at[t, p, axis, at])
      for axis, at in enumerate((cell // side, cell % side))
    )
    row, column = by_rank(0, i), by_rank(1, j)
    for c in range(num_cores):
      right = [
        sum(core[c][a][b] * column[b] for b in range(num_ranks))
        for a in range(num_ranks)
      ]
      total = sum(row[a] * right[a] for a in range(num_ranks))
      triton.store(found.at[t, p, place, c], total)
    virtual = addressing.shuffle(i * num_keys + j, num_keys, salt)
    block, slot = addressing.split(virtual, num_slots)
    at = p * num_selected + place
    triton.store(found_slot.at[t, at], slot)
    triton.store(found_block.at[t, at], block)

  flat = num_tokens, num_heads * num_selected
  spare = num_selected + 1
  shapes = dict(
    found=(num_tokens, num_heads, num_selected, num_cores),
    slot=flat,
    block=flat,
    keys=(num_tokens, num_heads, 2, spare),
    cells=(num_tokens, num_heads, spare),
  )
  mat = jax.typeof(scores).manual_axis_type
  found, slot, block, _, _ = pl.pallas_call(
    kernel,
    grid=(num_tokens, num_heads),
    out_shape=[
      jax.ShapeDtypeStruct(
        shape,
        jnp.float32 if name == 'found' else jnp.int32,
        manual_axis_type=mat,
      )
      for name, shape in shapes.items()
    ],
    compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
    interpret=interpret,
    name='retrieve',
  )(scores, cores, *directions, factor)
  return found, slot, block


def retrieve_reference(
  scores: Float[Array, '2 r_parts T P Q'],
  cores: Float[Array, 'c P r r'],
  directions: Directions,
  factor: Float[Array, 'T 2'] | None,
  num_selected: int,
  *,
  num_slots: int,
  salt: int = 0,
) -> Cells:
  """The same by `tucker_top_m`, best cells first."""
  num_tokens, num_heads, num_keys = scores.shape[2:]
  by_part = scores.reshape(
    2, cores.shape[-1], -1, num_tokens, num_heads, num_keys
  )
  row, column = jnp.moveaxis(by_part.sum(2), 1, -1)
  if factor is not None:
    row, column = (
      x * factor[:, axis, None, None, None]
      for axis, x in enumerate((row, column))
    )
  found, address = tucker_top_m(
    row, column, cores, num_selected, directions=directions, is_stable=True
  )
  virtual = addressing.shuffle(address, num_keys, salt)
  block, slot = addressing.split(virtual, num_slots)
  return found, slot.reshape(num_tokens, -1), block.reshape(num_tokens, -1)
