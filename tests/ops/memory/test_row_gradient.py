# SPDX-License-Identifier: Apache-2.0
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.config.errors import UserError
from jaxsparse.ops.memory import row_gradient as module
from jaxsparse.ops.memory.row_gradient import row_gradient, sort_references
from jaxsparse.ops.memory.value_bag import value_bag_reference


def _inputs(T=6, k=5, c=2, E=4, M=11, W=8, seed=0):
  rng = np.random.default_rng(seed)
  slot = rng.integers(M, size=(T, k)).astype(np.int32)
  weight = rng.normal(size=(T, k, c)).astype(np.float32)
  cotangent = rng.normal(size=(T, E or 1, W)).astype(np.float32)
  pool = rng.integers(E, size=(T, k)).astype(np.int32) if E else None
  return slot, weight, cotangent, pool


row_gradient_reference = jax.jit(
  module.row_gradient_reference, static_argnums=4
)


@functools.partial(jax.jit, static_argnames=('num_rows', 'budget'))
def _dense(slot, weight, cotangent, pool, num_rows, budget, first_row=0):
  """All windows one after another, as a train step would take them."""
  references = sort_references(slot, num_rows, first_row)
  shape = (num_rows, cotangent.shape[-1])

  def add(i, dense):
    rows = row_gradient(references, weight, cotangent, pool, budget, i * budget)
    # Rows that come twice, or not in order, would not survive this promise.
    return dense.at[rows.slot].add(
      rows.value, mode='drop', unique_indices=True, indices_are_sorted=True
    )

  dense = jnp.zeros(shape)
  dense, *_ = module.match_vma(dense, references.row, cotangent)
  num_windows = -(-references.num_distinct // budget)
  return jax.lax.fori_loop(0, num_windows, add, dense)


@functools.partial(jax.jit, static_argnames=('num_rows', 'budget'))
def _window(slot, *args, num_rows, first_row=0, **kwargs):
  references = sort_references(slot, num_rows, first_row)
  return row_gradient(references, *args, **kwargs), references.num_distinct


@functools.partial(jax.jit, static_argnames='num_rows')
def _autodiff(slot, weight, cotangent, pool, num_rows):
  def bag(table):
    return value_bag_reference(table, slot, weight, pool, cotangent.shape[1])

  table = jnp.zeros((num_rows, cotangent.shape[-1]))
  return jax.vjp(bag, table)[1](cotangent)[0]


def _slots(kind, T, k, M):
  generator = np.random.default_rng(1)
  slots = {
    'uniform': generator.integers(0, M, (T, k)),
    'zipf': np.minimum(generator.zipf(1.2, (T, k)) - 1, M - 1),
    'first': np.zeros((T, k)),
    'last': np.full((T, k), M - 1),
  }[kind]
  return slots.astype(np.int32)


@pytest.mark.parametrize('kind', ['uniform', 'zipf', 'first', 'last'])
@pytest.mark.parametrize(('E', 'c'), [(0, 1), (4, 2)])
def test_windows_make_up_the_dense_gradient(kind, E, c):
  T, k, M = 12, 9, 37
  _, *rest = _inputs(T=T, k=k, M=M, E=E, c=c)
  args = (_slots(kind, T, k, M), *rest)
  expected = _autodiff(*args, M)
  reference = row_gradient_reference(*args, M)
  np.testing.assert_allclose(reference, expected, rtol=1e-5, atol=1e-5)
  for budget in (4, 64):
    actual = _dense(*args, M, budget)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_blocks_that_do_not_divide_the_references(monkeypatch):
  monkeypatch.setattr(module, '_BLOCK_BYTES', 7 * 8 * 4)
  args = _inputs(T=13, k=5, M=19)
  # Afresh: a trace kept from elsewhere would hide the patched constant.
  actual = jax.jit(lambda *args: _dense.__wrapped__(*args, 19, 6))(*args)
  expected = _autodiff(*args, 19)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_rows_are_distinct_and_ascend_into_the_unused():
  args = _inputs(T=4, k=3, M=1000)
  rows, num_distinct = _window(
    *args, num_rows=1000, budget=20, first_position=3
  )
  distinct = np.unique(args[0])
  assert num_distinct == len(distinct)
  used = len(distinct) - 3
  slot, value = np.asarray(rows.slot), np.asarray(rows.value)
  np.testing.assert_array_equal(slot[:used], distinct[3:])
  assert np.all(slot[used:] >= 1000)
  assert np.all(np.diff(slot) > 0)
  assert not np.any(value[used:])


def test_foreign_rows_are_left_out():
  args = _inputs(T=9, M=30)
  expected = np.asarray(_autodiff(*args, 30))
  actual = _dense(*args, 7, 3, first_row=11)
  np.testing.assert_allclose(actual, expected[11:18], rtol=1e-5, atol=1e-5)


def test_a_device_without_references_gets_zeros():
  rows, num_distinct = _window(*_inputs(), num_rows=5, first_row=100, budget=3)
  assert num_distinct == 0
  np.testing.assert_array_equal(rows.slot, [5, 6, 7])
  assert not np.any(rows.value)


def test_no_references_at_all():
  rows, num_distinct = _window(*_inputs(k=0), num_rows=5, budget=3)
  assert num_distinct == 0
  assert not np.any(rows.value)


def test_narrow_inputs_are_summed_in_f32():
  slot, weight, cotangent, pool = _inputs(T=64, k=16, M=1)
  narrow = weight.astype(jnp.bfloat16), cotangent.astype(jnp.bfloat16)
  wide = [x.astype(np.float32) for x in narrow]
  rows, _ = _window(slot, *narrow, pool, num_rows=1, budget=1)
  assert rows.value.dtype == jnp.float32
  expected = row_gradient_reference(slot, *wide, pool, 1)
  np.testing.assert_allclose(rows.value, expected, rtol=1e-5, atol=1e-4)


def test_every_device_sums_its_rows_and_columns():
  """Rows over 2 devices and columns over 4, inside a checked shard_map."""
  slot, weight, cotangent, pool = _inputs(T=10, k=6, M=26, W=16, c=1)
  mesh = jax.make_mesh((2, 4), ('rows', 'columns'))
  with jax.set_mesh(mesh):

    @jax.jit
    @functools.partial(
      jax.shard_map,
      in_specs=(jax.P(), jax.P(), jax.P(None, None, 'columns'), jax.P()),
      out_specs=jax.P('rows', 'columns'),
    )
    def sharded(slot, weight, cotangent, pool):
      first_row = 13 * jax.lax.axis_index('rows')
      return _dense(slot, weight, cotangent, pool, 13, 4, first_row)

    columns = jax.device_put(cotangent, jax.P(None, None, 'columns'))
    actual = sharded(slot, weight, columns, pool)
  expected = _autodiff(slot, weight, cotangent, pool, 26)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_compiled_program_never_holds_all_updates():
  T, k, W, M, budget = 512, 32, 32, 1000, 64
  args = _inputs(T=T, k=k, W=W, M=M, c=1)

  def window(slot, *rest):
    return row_gradient(sort_references(slot, M), *rest, budget)

  compiled = jax.jit(window).lower(*args).compile()
  sizes = [
    np.prod([int(d) for d in dims.split(',')])
    for dims in re.findall(r'f32\[([\d,]+)\]', compiled.as_text())
  ]
  assert max(sizes) < T * k * W / 4


def test_refuses_an_empty_budget():
  with pytest.raises(UserError, match='budget must be positive, got 0'):
    _window(*_inputs(), num_rows=11, budget=0)


def test_sums_in_a_fixed_order_are_the_same_sums(monkeypatch):
  """A GPU's form for copies of a table, run here."""
  rng = np.random.default_rng(0)
  slot = np.minimum(rng.zipf(1.3, (20, 7)), 30) - 1
  weight = rng.normal(size=(20, 7, 2)).astype(np.float32)
  cotangent = rng.normal(size=(20, 1, 8)).astype(np.float32)

  @jax.jit
  def all_sums(slot, weight, cotangent):
    references = module.sort_references(slot, 30)
    value = jnp.zeros((30, 8))
    return [
      module._add_window(
        references, weight, cotangent, None, 0, add, num_bytes, value
      )
      for add in (module._add_equal_rows, module._add_once_per_row)
      for num_bytes in (17 * 32, 2**20)
    ]

  sums = all_sums(slot.astype(np.int32), weight, cotangent)
  for other in sums[1:]:
    np.testing.assert_allclose(other, sums[0], rtol=1e-5, atol=1e-5)
