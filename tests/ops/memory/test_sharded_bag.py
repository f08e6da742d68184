# SPDX-License-Identifier: Apache-2.0
"""Every scheme on 8 devices equals the bag on one, and sends what it should."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import arrays_of_size, payloads
from lanes import few

from jaxsparse import mesh as mesh_lib
from jaxsparse.ops.memory.gathered_dot import gathered_dot_reference
from jaxsparse.ops.memory.sharded_bag import (
  sharded_gathered_dot,
  sharded_value_bag,
)
from jaxsparse.ops.memory.value_bag import value_bag_reference

# Rows that 8 devices can split, and that are no power of two.
M, W, B, T, k = 136, 48, 8, 3, 5

# Meshes on which a scheme has something to do, `model` included.
CASES = [
  ('columns', (1, 8, 1)),
  ('columns', (2, 2, 2)),
  ('rows', (1, 8, 1)),
  ('rows', (2, 2, 2)),
  ('grid', (2, 4, 1)),
  ('grid', (2, 2, 2)),
  ('grid', (8, 1, 1)),
]


def inputs(num_pools=4, num_cores=2, skew='zipf'):
  rng = np.random.default_rng(0)
  table = rng.normal(size=(M, W))
  slot = {
    'uniform': lambda: rng.integers(M, size=(B, T, k)),
    'zipf': lambda: np.minimum(rng.zipf(1.2, (B, T, k)), M) - 1,
    'same': lambda: np.full((B, T, k), M - 1),
  }[skew]()
  weight = rng.normal(size=(B, T, k, num_cores))
  pool = rng.integers(num_pools, size=(B, T, k)) if num_pools > 1 else None
  cotangent = rng.normal(size=(B, T, num_pools, W))
  return (
    table.astype(np.float32),
    slot.astype(np.int32),
    weight.astype(np.float32),
    None if pool is None else pool.astype(np.int32),
    cotangent.astype(np.float32),
  )


def place(scheme, table, slot, weight, pool, cotangent):
  tokens = jax.P(mesh_lib.TOKENS)
  pools = jax.P(mesh_lib.TOKENS, None, None, 'model')
  specs = (mesh_lib.table(scheme), tokens, tokens, tokens, pools)
  return [
    x if x is None else jax.device_put(x, spec)
    for x, spec in zip(
      (table, slot, weight, pool, cotangent), specs, strict=True
    )
  ]


def run(bag, table, slot, weight, pool, cotangent):
  """The bags and the gradients of the table and of the weights."""

  def loss(table, weight):
    pooled = bag(table, slot, weight, pool, cotangent.shape[2])
    return (pooled * cotangent).sum(), pooled

  gradients, pooled = jax.grad(loss, (0, 1), has_aux=True)(table, weight)
  return pooled, *gradients


def reference(table, slot, weight, pool, num_pools):
  flat = [x if x is None else x.reshape(-1, *x.shape[2:]) for x in
          (slot, weight, pool)]  # fmt: skip
  return value_bag_reference(table, *flat, num_pools).reshape(
    *slot.shape[:2], num_pools, -1
  )


@functools.cache
def expected(*case):
  return jax.jit(functools.partial(run, reference))(*inputs(*case))


@functools.cache
def sharded(scheme):
  bag = functools.partial(sharded_value_bag, scheme=scheme)
  return jax.jit(functools.partial(run, bag))


def check(actual, expected):
  for a, e in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('case', 'pools_and_cores', 'skew'),
  few(
    [(CASES[i], (4, 2), 'zipf') for i in (1, 3, 5)]
    + [(CASES[0], (1, 1), 'zipf'), (CASES[5], (4, 2), 'same')],
    itertools.product(CASES, [(1, 1), (4, 2)], ['zipf', 'same']),
  ),
  ids=str,
)
def test_scheme_equals_one_device(case, pools_and_cores, skew):
  (scheme, sizes), case = case, (*pools_and_cores, skew)
  with jax.set_mesh(mesh_lib.make_mesh(*sizes)):
    args = place(scheme, *inputs(*case))
    pooled, d_table, d_weight = sharded(scheme)(*args)
  check((pooled, d_table, d_weight), expected(*case))
  for gradient, of in ((d_table, args[0]), (d_weight, args[2])):
    assert gradient.sharding.spec == jax.typeof(of).sharding.spec


@pytest.mark.parametrize(
  ('scheme', 'table_gradient'),
  few(
    [('columns', 'sorted'), ('grid', 'deterministic')],
    itertools.product(['columns', 'rows', 'grid'], ['sorted', 'deterministic']),
  ),
)
def test_under_remat_and_summed_over_micro_batches(scheme, table_gradient):
  bag = jax.checkpoint(
    functools.partial(
      sharded_value_bag, scheme=scheme, table_gradient=table_gradient
    ),
    static_argnums=(4,),
  )

  def in_micro_batches(table, *rest):
    """One position at a time; the table's gradients are added up."""

    def step(total, micro):
      micro = [None if x is None else x[:, None] for x in micro]
      pooled, d_table, d_weight = run(bag, table, *micro)
      return total + d_table, (pooled[:, 0], d_weight[:, 0])

    micros = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), rest)
    d_table, (pooled, d_weight) = jax.lax.scan(
      step, jnp.zeros_like(table), micros
    )
    return jnp.moveaxis(pooled, 0, 1), d_table, jnp.moveaxis(d_weight, 0, 1)

  with jax.set_mesh(mesh_lib.make_mesh(2, 2, 2)):
    args = place(scheme, *inputs())
    check(jax.jit(in_micro_batches)(*args), expected(4, 2, 'zipf'))


@pytest.mark.parametrize(
  'scheme', few(['columns', 'grid'], ['columns', 'rows', 'grid'])
)
def test_bag_of_values_scaled_by_pre_values(scheme):
  """Of UltraMemV2: products with one table's rows scale those of another."""
  table, slot, weight, _, cotangent = inputs(1, 2)
  vector = np.cos(np.arange(B * T * W, dtype=np.float32)).reshape(B, T, W)
  pre_table = np.sin(table)

  def layer(bag, products, pre_table, table, slot, weight, vector, cotangent):
    def loss(pre_table, table, weight, vector):
      scale = jax.nn.relu(products(pre_table, slot, vector))[..., None]
      pooled = bag(table, slot, weight * scale, None, 1)
      return (pooled * cotangent).sum(), pooled

    gradients, pooled = jax.grad(loss, (0, 1, 2, 3), has_aux=True)(
      pre_table, table, weight, vector
    )
    return pooled, *gradients

  def products(table, slot, vector):
    flat = gathered_dot_reference(
      table, slot.reshape(-1, k), vector.reshape(-1, W)
    )
    return flat.reshape(slot.shape)

  expected = jax.jit(functools.partial(layer, reference, products))(
    pre_table, table, slot, weight, vector, cotangent
  )
  of_scheme = functools.partial(
    layer,
    functools.partial(sharded_value_bag, scheme=scheme),
    functools.partial(sharded_gathered_dot, scheme=scheme),
  )
  with jax.set_mesh(mesh_lib.make_mesh(2, 2, 2)):
    vectors = jax.P(mesh_lib.TOKENS, None, 'model')
    table, slot, weight, _, cotangent = place(
      scheme, table, slot, weight, None, cotangent
    )
    pre_table = jax.device_put(pre_table, mesh_lib.table(scheme))
    vector = jax.device_put(vector, vectors)
    actual = jax.jit(of_scheme)(
      pre_table, table, slot, weight, vector, cotangent
    )
  for a, e in zip(actual, expected, strict=True):
    np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max())


def test_a_slice_may_begin_inside_a_core():
  """48 columns over 8 devices, 3 cores of 16: device 2 has parts of two."""
  case = (1, 3, 'uniform')
  with jax.set_mesh(mesh_lib.make_mesh(1, 4, 2)):
    args = place('columns', *inputs(*case))
    check(sharded('columns')(*args), expected(*case))


def compiled_text(scheme, with_gradients):
  bag = functools.partial(sharded_value_bag, scheme=scheme)
  args = place(scheme, *inputs())

  def forward(table, slot, weight, pool, cotangent):
    return bag(table, slot, weight, pool, cotangent.shape[2])

  function = sharded(scheme) if with_gradients else jax.jit(forward)
  return function.lower(*args).compile().as_text()


# Of one device: its own tokens t, its group's T, its columns w of the table.
def index_payloads(group_size):
  entries = group_size * (B * T // 8) * k
  return [('all-gather', 'f32', 2 * entries), ('all-gather', 'u32', entries)]


POOLS = 4 * W * B * T // 8


@pytest.mark.parametrize(
  ('scheme', 'sizes', 'group_size', 'pools', 'gradients'),
  [
    ('columns', (1, 8, 1), 8, ['all-to-all'], ['all-to-all']),
    ('rows', (1, 8, 1), 8, ['reduce-scatter'], ['all-gather']),
    (
      'grid', (2, 4, 1), 8, ['all-to-all', 'reduce-scatter'],
      ['all-gather', 'all-to-all'],
    ),
  ],
)  # fmt: skip
def test_only_numbers_weights_and_pools_are_sent(
  scheme, sizes, group_size, pools, gradients
):
  with jax.set_mesh(mesh_lib.make_mesh(*sizes)):
    forward = payloads(compiled_text(scheme, with_gradients=False))
    both = compiled_text(scheme, with_gradients=True)
  expected = [
    *index_payloads(group_size),
    *((op, 'f32', POOLS) for op in pools),
  ]
  assert forward == sorted(expected)
  # A gather counts by what it receives: the tokens of all owners of rows.
  gathered = dict.fromkeys(['all-to-all'], POOLS)
  gathered['all-gather'] = POOLS * math.prod(
    sizes[: 2 if scheme == 'rows' else 1]
  )
  expected += [(op, 'f32', gathered[op]) for op in gradients]
  expected += [('reduce-scatter', 'f32', 2 * B * T // 8 * k)]
  assert payloads(both) == sorted(expected)
  for op in ('all-gather', 'copy'):
    assert not arrays_of_size(both, op, M * W)
