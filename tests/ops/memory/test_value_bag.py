# SPDX-License-Identifier: Apache-2.0
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse import mesh as mesh_lib
from jaxsparse.config.errors import UserError
from jaxsparse.ops import chunking
from jaxsparse.ops.memory import value_bag as bag
from jaxsparse.ops.memory import value_bag_gradient as gradient
from jaxsparse.ops.memory.value_bag import value_bag, value_bag_reference

# Two tokens, or 16 rows, of the inputs below.
_CHUNK_BYTES = 16 * 8 * 4
FORMS = {
  'platform': {},
  'gpu': dict(
    forward=lambda *args: _forward_gpu(*args),
    weight_gradient=gradient._weight_gradient_whole,
    scatter=gradient._scatter_whole,
    sorted=gradient._sorted_whole,
    deterministic=gradient._distinct_rows,
  ),
  'tpu': dict(
    forward=lambda *args: bag._forward_chunked(*args, _CHUNK_BYTES),
    weight_gradient=gradient._weight_gradient_chunked(_CHUNK_BYTES),
    scatter=gradient._scatter_chunked(_CHUNK_BYTES),
    sorted=gradient._sorted_chunks(_CHUNK_BYTES),
    deterministic=gradient._scatter_chunked(_CHUNK_BYTES),
  ),
}


def _forward_gpu(table, slot, weight, pool, num_valid, num_pools):
  if num_valid is None:
    return bag._forward_fused(table, slot, weight, pool, num_pools)
  return bag._forward_unrolled(
    table, slot, weight, pool, num_valid, num_pools, 28
  )


def _use_form(name, monkeypatch):
  if not (form := FORMS[name]):
    return
  monkeypatch.setattr(bag, '_forward', lambda *a: form['forward'](*a))
  # Two tokens of the inputs below in one kernel.
  monkeypatch.setattr(bag, '_FUSED_READS', 2 * 5 * 4 * 8)
  monkeypatch.setattr(gradient, 'weight_gradient', form['weight_gradient'])
  monkeypatch.setattr(
    gradient,
    'table_gradient',
    lambda *args: form[args[-1]](*args[:-1]).astype(args[0].dtype),
  )


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
  """Each backend's form, on this backend."""
  _use_form(request.param, monkeypatch)
  return request.param


def _inputs(T=6, k=5, c=2, E=4, M=11, W=8, dtype=jnp.float32, seed=0):
  rng = np.random.default_rng(seed)
  table = rng.normal(size=(M, W)).astype(dtype)
  slot = rng.integers(M, size=(T, k)).astype(np.int32)
  weight = rng.normal(size=(T, k, c)).astype(np.float32)
  pool = rng.integers(E, size=(T, k)).astype(np.int32) if E else None
  # Unlike `jnp.asarray`, without a program for each shape.
  return jax.device_put((table, slot, weight, pool))


def _gradients_of(
  function, table, slot, weight, pool, num_pools, **options
):  # fmt: skip
  def loss(table, weight):
    pooled = function(table, slot, weight, pool, num_pools, **options)
    factor = jnp.cos(jnp.arange(pooled.size).reshape(pooled.shape))
    spec = mesh_lib.act('B..')
    return (pooled * mesh_lib.reshard(factor, spec)).sum(), pooled

  return jax.grad(loss, (0, 1), has_aux=True)(table, weight)


def _compiled(function, **options):
  """Gradients of table and weights, and the bags.

  To be made afresh where a form is patched, which a cache would hide.
  """
  function = functools.partial(function, **options)
  return jax.jit(
    functools.partial(_gradients_of, function), static_argnums=(4,)
  )


def _gradients(function, *args, **options):
  return _compiled(function, **options)(*args)


# The same for every form and for all inputs of a shape.
_reference = _compiled(value_bag_reference)


def _assert_close(actual, expected, atol=1e-5):
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=atol),
    actual,
    expected,
  )


def _assert_equals_reference(
  table,
  slot,
  weight,
  pool,
  num_pools,
  atol=1e-5,
):
  args = (table, slot, weight, pool, num_pools)
  _assert_close(_gradients(value_bag, *args), _reference(*args), atol)


SIZES = [
  dict(c=1, E=1),
  dict(c=4, k=1, T=1),
  dict(k=30, M=7),
  dict(T=7, k=3, M=13),
  dict(E=0, k=9),
]


@pytest.mark.parametrize('sizes', few(SIZES[:4], SIZES), ids=str)
def test_equals_reference(form, sizes):
  args = _inputs(**sizes)
  num_pools = sizes.get('E', 4) or 1
  _assert_equals_reference(*args, num_pools)


def test_one_slot_for_all_collects_every_gradient(form):
  table, slot, weight, pool = _inputs()
  run = _compiled(value_bag)
  for row in (0, 10):
    args = (table, np.full_like(slot, row), weight, pool, 4)
    _assert_close(run(*args), _reference(*args), atol=1e-4)


NUM_VALID = {
  'all': [5] * 6,
  'some': [0, 5, 3, 1, 0, 4],
  'few': [0, 2, 1, 0, 0, 2],
  'none': [0] * 6,
}


def _with_nonsense_beyond(num_valid, slot, weight, pool):
  """Slots out of range and weights that are not numbers, where not in use."""
  beyond = np.arange(slot.shape[1])[None] >= np.asarray(num_valid)[:, None]
  return (
    np.where(beyond, np.int32(2**30), slot),
    np.where(beyond[..., None], np.float32(np.nan), weight),
    np.where(beyond, np.int32(-7), pool),
  )


@pytest.fixture
def small_pieces(monkeypatch):
  """Chunks of few entries or references, so that a loop goes over many."""
  monkeypatch.setattr(chunking, '_ENTRIES', 2)
  monkeypatch.setattr(gradient, '_ENTRIES_GPU', 2)
  monkeypatch.setattr(gradient, 'REFERENCES_GPU', 16)
  monkeypatch.setattr(chunking, 'CHUNK_BYTES_CPU', _CHUNK_BYTES)


@pytest.mark.parametrize('way', gradient.ACCUMULATION_MODES)
def test_entries_beyond_those_in_use_do_not_matter(form, way, small_pieces):
  table, slot, weight, pool = _inputs(M=12)

  run = _compiled(value_bag, table_gradient=way)
  for num_valid in NUM_VALID.values():
    num_valid = np.array(num_valid, np.int32)
    nonsense = _with_nonsense_beyond(num_valid, slot, weight, pool)
    _assert_close(
      run(table, *nonsense, 4, num_valid=num_valid),
      _reference(table, slot, weight, pool, 4, num_valid=num_valid),
    )


@pytest.mark.parametrize(
  ('E', 'c'), few([(1, 1), (4, 2)], itertools.product([1, 4], [1, 2]))
)
@pytest.mark.parametrize('way', ['sorted', 'deterministic'])
def test_every_way_to_add_up_the_table_gradient(form, way, E, c, small_pieces):
  table, slot, weight, pool = _inputs(T=9, c=c, E=E if E > 1 else 0, M=23)
  rng = np.random.default_rng(0)
  zipf = np.asarray(rng.zipf(1.2, slot.shape) % 23, np.int32)
  run = _compiled(value_bag, table_gradient=way)
  for s in (slot, zipf, np.full_like(slot, 22)):
    args = (table, s, weight, pool, E)
    (actual, _), _ = run(*args)
    (expected, _), _ = _reference(*args)
    _assert_close(actual, expected, atol=1e-4)


def test_time_follows_the_entries_in_use():
  """A loop over chunks whose number is only known when it runs."""
  table, slot, weight, pool = _inputs(k=40)

  def pool_rows(num_valid):
    return value_bag(table, slot, weight, pool, 4, num_valid=num_valid)

  text = str(jax.make_jaxpr(pool_rows)(np.full(6, 3, np.int32)))
  assert 'while[' in text
  assert 'reduce_max' in text


def test_an_unknown_way_is_refused():
  with pytest.raises(UserError, match=r"table_gradient = 'fast' must be one"):
    value_bag(*_inputs(), 4, table_gradient='fast')


@pytest.mark.parametrize('name', FORMS)
def test_deterministic_twice_is_the_same_bits(name, monkeypatch):
  _use_form(name, monkeypatch)
  args = _inputs(T=32, k=9, M=5)
  run = _compiled(value_bag, table_gradient='deterministic')
  first, second = (run(*args, 4)[0][0] for _ in range(2))
  np.testing.assert_array_equal(first, second)


def test_no_two_adds_meet_on_a_gpu_in_the_deterministic_way():
  update = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
  sum_equal_rows = jax.jit(gradient.sum_equal_rows, static_argnums=2)

  def added(rows, updates):
    """To zeros; rows out of range are dropped."""
    total = np.zeros((5, 3))
    in_range = rows < 5
    np.add.at(total, rows[in_range], updates[in_range])
    return total

  for row in ([0, 0, 0, 1, 2, 2, 5, 5], [3] * 8, [0, 1, 2, 3, 4, 5, 5, 5]):
    row = np.array(row, np.int32)
    distinct, total = map(np.asarray, sum_equal_rows(row, update, 5))
    assert len(set(distinct.tolist())) == 8
    assert distinct.min() >= 0
    np.testing.assert_allclose(
      added(distinct, total), added(row, update), rtol=1e-5, atol=1e-6
    )


def _temp_bytes(function, *args):
  compiled = jax.jit(function).lower(*args).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('way', gradient.ACCUMULATION_MODES)
def test_no_table_gradient_behind_stop_gradient(way):
  """Nothing the size of the table, also in a rematerialized block."""
  table, slot, weight, pool = _inputs(M=2**14, W=64)

  def loss(weight, table):
    table = jax.lax.stop_gradient(table)
    bag = jax.checkpoint(
      lambda w: value_bag(table, slot, w, pool, 4, table_gradient=way)
    )
    return (bag(weight) ** 2).sum()

  assert _temp_bytes(jax.grad(loss), weight, table) < table.nbytes / 4


def test_zero_weights_give_zero_and_no_table_gradient():
  table, slot, weight, pool = _inputs()
  (d_table, d_weight), pooled = _gradients(
    value_bag, table, slot, np.zeros_like(weight), pool, 4
  )
  assert not np.any(pooled)
  assert not np.any(d_table)
  assert np.any(d_weight)


def test_gradient_is_that_of_a_one_hot_matmul_and_zero_elsewhere():
  table, slot, weight, pool = _inputs(M=40, c=1)

  def dense(table, slot, weight, pool, num_pools):
    one_hot = jax.nn.one_hot(slot, 40) * weight
    pools = jax.nn.one_hot(pool, num_pools)
    return jnp.einsum('tkm,tkg,mw->tgw', one_hot, pools, table)

  (actual, _), _ = _gradients(value_bag, table, slot, weight, pool, 4)
  (expected, _), _ = _gradients(dense, table, slot, weight, pool, 4)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
  unused = np.setdiff1d(np.arange(40), slot)
  assert len(unused) > 0
  assert not np.any(np.asarray(actual)[unused])


def test_bf16_tables_are_summed_in_f32(form):
  table, slot, weight, pool = _inputs(dtype=jnp.bfloat16, k=19)
  (d_table, d_weight), pooled = _gradients(
    value_bag, table, slot, weight, pool, 4
  )
  assert pooled.dtype == jnp.float32
  np.testing.assert_allclose(
    pooled,
    _reference(np.asarray(table, np.float32), slot, weight, pool, 4)[1],
    rtol=1e-5,
    atol=1e-5,
  )
  assert d_table.dtype == jnp.bfloat16
  assert d_weight.dtype == jnp.float32


def test_under_jit_remat_scan_and_vmap():
  table, slot, weight, pool = _inputs()
  expected = _reference(table, slot, weight, pool, 4)

  def remat(*args):
    return jax.checkpoint(lambda t, w: value_bag(t, args[1], w, args[3], 4))(
      args[0], args[2]
    )

  def scan(table, slot, weight, pool, num_pools):
    def step(_, x):
      s, w, g = (a[None] for a in x)
      return None, value_bag(table, s, w, g, num_pools)[0]

    return jax.lax.scan(step, None, (slot, weight, pool))[1]

  def vmap(table, slot, weight, pool, num_pools):
    def one(s, w, g):
      return value_bag(table, s[None], w[None], g[None], num_pools)[0]

    return jax.vmap(one)(slot, weight, pool)

  for function in (remat, scan, vmap):
    actual = _gradients(function, table, slot, weight, pool, 4)
    _assert_close(actual, expected)


def test_empty_bags():
  table, slot, weight, pool = _inputs(k=0)
  (d_table, _), pooled = _gradients(value_bag, table, slot, weight, pool, 4)
  assert not np.any(pooled)
  assert not np.any(d_table)


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 1, 4), (2, 2, 2)])
def test_every_device_pools_its_tokens(sizes):
  table, slot, weight, pool = _inputs(T=16)
  expected = _reference(table, slot, weight, pool, 4)
  with jax.set_mesh(mesh_lib.make_mesh(*sizes)):

    def pool_rows(table, slot, weight, pool, num_pools):
      function = mesh_lib.over_tokens(
        lambda t, s, w, g: value_bag(t, s, w, g, num_pools), replicated=(0,)
      )
      return function(table, slot, weight, pool)

    def place(x):
      return jax.device_put(x, mesh_lib.act('B' + '.' * (x.ndim - 1)))

    slot, weight, pool = map(place, (slot, weight, pool))
    table = jax.device_put(table, jax.P())
    _assert_close(_gradients(pool_rows, table, slot, weight, pool, 4), expected)


def test_no_gathered_rows_in_the_compiled_program():
  """Nothing of [T, k, W], neither kept for the backward pass nor in passing."""
  T, k, W, M = 2048, 64, 64, 1000
  args = _inputs(T=T, k=k, W=W, M=M)

  def backward(table, weight):
    pooled, vjp = jax.vjp(
      lambda t, w: value_bag(t, args[1], w, args[3], 4), table, weight
    )
    return vjp(pooled)

  compiled = jax.jit(backward).lower(args[0], args[2]).compile()
  sizes = [
    np.prod([int(d) for d in dims.split(',')])
    for dims in re.findall(r'f32\[([\d,]+)\]', compiled.as_text())
  ]
  assert max(sizes) < T * k * W
  naive = _reference.lower(*args, 4).compile()
  assert (
    compiled.memory_analysis().temp_size_in_bytes
    < naive.memory_analysis().temp_size_in_bytes / 2
  )
