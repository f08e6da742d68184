import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse import mesh as mesh_lib
from jaxsparse.ops import value_bag as module
from jaxsparse.ops.value_bag import value_bag, value_bag_reference

FORMS = {
  'platform': {},
  'unrolled': {
    '_forward': lambda t, s, w, g, G: module._forward_unrolled(
      t, s, w, g, G, 28
    )
  },
  'chunked': {
    '_forward': lambda *args: module._forward_chunked(*args),
    '_backward': lambda *args: module._backward_chunked(*args),
  },
  'whole': {'_backward': lambda *args: module._backward_whole(*args)},
}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
  """Each backend's form, on this backend."""
  for name, function in FORMS[request.param].items():
    monkeypatch.setattr(module, name, function)
  return request.param


def _inputs(T=6, k=5, c=2, G=4, M=11, W=8, dtype=jnp.float32, seed=0):
  keys = jax.random.split(jax.random.key(seed), 4)
  table = jax.random.normal(keys[0], (M, W)).astype(dtype)
  slot = jax.random.randint(keys[1], (T, k), 0, M)
  weight = jax.random.normal(keys[2], (T, k, c))
  group = jax.random.randint(keys[3], (T, k), 0, G) if G else None
  return table, slot, weight, group


def _gradients(function, table, slot, weight, group, num_groups):
  def loss(table, weight):
    pooled = function(table, slot, weight, group, num_groups)
    factor = jnp.cos(jnp.arange(pooled.size).reshape(pooled.shape))
    spec = mesh_lib.act('B..')
    return (pooled * mesh_lib.reshard(factor, spec)).sum(), pooled

  # Compiled afresh: op by op is slow, and a cache would hide a patched form.
  return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(table, weight)


def _assert_equals_reference(table, slot, weight, group, num_groups, atol=1e-5):
  actual = _gradients(value_bag, table, slot, weight, group, num_groups)
  expected = _gradients(
    value_bag_reference, table, slot, weight, group, num_groups
  )
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=atol),
    actual,
    expected,
  )


@pytest.mark.parametrize(
  'sizes',
  [
    dict(c=1, G=1),
    dict(c=4, k=1, T=1),
    dict(k=30, M=7),
    dict(G=0, k=9),
  ],
  ids=str,
)
def test_equals_reference(form, sizes):
  args = _inputs(**sizes)
  num_groups = sizes.get('G', 4) or 1
  _assert_equals_reference(*args, num_groups)


def test_one_slot_for_all_collects_every_gradient(form):
  table, slot, weight, group = _inputs()
  for row in (0, 10):
    _assert_equals_reference(
      table, jnp.full_like(slot, row), weight, group, 4, atol=1e-4
    )


def test_chunks_of_tokens_that_do_not_divide(form, monkeypatch):
  monkeypatch.setattr(module, '_CHUNK_BYTES', 2 * 3 * 8 * 4)
  # Sizes of their own: the jitted forms cache by shape, not by chunk size.
  _assert_equals_reference(*_inputs(T=7, k=3, M=13), 4)


def test_zero_weights_give_zero_and_no_table_gradient():
  table, slot, weight, group = _inputs()
  (d_table, d_weight), pooled = _gradients(
    value_bag, table, slot, 0 * weight, group, 4
  )
  assert not np.any(pooled)
  assert not np.any(d_table)
  assert np.any(d_weight)


def test_gradient_is_that_of_a_one_hot_matmul_and_zero_elsewhere():
  table, slot, weight, group = _inputs(M=40, c=1)

  def dense(table, slot, weight, group, num_groups):
    one_hot = jax.nn.one_hot(slot, 40) * weight
    groups = jax.nn.one_hot(group, num_groups)
    return jnp.einsum('tkm,tkg,mw->tgw', one_hot, groups, table)

  (actual, _), _ = _gradients(value_bag, table, slot, weight, group, 4)
  (expected, _), _ = _gradients(dense, table, slot, weight, group, 4)
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
  unused = np.setdiff1d(np.arange(40), slot)
  assert len(unused) > 0
  assert not np.any(np.asarray(actual)[unused])


def test_bf16_tables_are_summed_in_f32(form):
  table, slot, weight, group = _inputs(dtype=jnp.bfloat16, k=19)
  (d_table, d_weight), pooled = _gradients(
    value_bag, table, slot, weight, group, 4
  )
  assert pooled.dtype == jnp.float32
  np.testing.assert_allclose(
    pooled,
    value_bag_reference(table.astype(jnp.float32), slot, weight, group, 4),
    rtol=1e-5,
    atol=1e-5,
  )
  assert d_table.dtype == jnp.bfloat16
  assert d_weight.dtype == jnp.float32


def test_under_jit_remat_scan_and_vmap():
  table, slot, weight, group = _inputs()
  expected = _gradients(value_bag_reference, table, slot, weight, group, 4)

  def remat(*args):
    return jax.checkpoint(lambda t, w: value_bag(t, args[1], w, args[3], 4))(
      args[0], args[2]
    )

  def scan(table, slot, weight, group, num_groups):
    def step(_, x):
      s, w, g = (a[None] for a in x)
      return None, value_bag(table, s, w, g, num_groups)[0]

    return jax.lax.scan(step, None, (slot, weight, group))[1]

  def vmap(table, slot, weight, group, num_groups):
    def one(s, w, g):
      return value_bag(table, s[None], w[None], g[None], num_groups)[0]

    return jax.vmap(one)(slot, weight, group)

  for function in (remat, scan, vmap):
    actual = _gradients(function, table, slot, weight, group, 4)
    jax.tree.map(
      lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5),
      actual,
      expected,
    )


def test_empty_bags():
  table, slot, weight, group = _inputs(k=0)
  assert not np.any(value_bag(table, slot, weight, group, 4))
  (d_table, _), _ = _gradients(value_bag, table, slot, weight, group, 4)
  assert not np.any(d_table)


@pytest.mark.parametrize('sizes', [(8, 1, 1), (2, 1, 4), (2, 2, 2)])
def test_every_device_pools_its_tokens(sizes):
  table, slot, weight, group = _inputs(T=16)
  expected = _gradients(value_bag_reference, table, slot, weight, group, 4)
  with jax.set_mesh(mesh_lib.make_mesh(*sizes)):

    def pool(table, slot, weight, group, num_groups):
      function = mesh_lib.over_tokens(
        lambda t, s, w, g: value_bag(t, s, w, g, num_groups), replicated=(0,)
      )
      return function(table, slot, weight, group)

    def place(x):
      return jax.sharding.reshard(x, mesh_lib.act('B' + '.' * (x.ndim - 1)))

    slot, weight, group = map(place, (slot, weight, group))
    table = jax.sharding.reshard(table, jax.P())
    actual = jax.jit(lambda t, s, w, g: _gradients(pool, t, s, w, g, 4))(
      table, slot, weight, group
    )
    jax.tree.map(
      lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5),
      actual,
      expected,
    )


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
  naive = jax.jit(
    lambda t, w: _gradients(value_bag_reference, t, args[1], w, args[3], 4)
  )
  naive = naive.lower(args[0], args[2]).compile()
  assert (
    compiled.memory_analysis().temp_size_in_bytes
    < naive.memory_analysis().temp_size_in_bytes / 2
  )
