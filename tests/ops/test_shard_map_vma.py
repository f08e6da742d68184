# SPDX-License-Identifier: Apache-2.0
"""What an order made on each device sorts gets the gradient of all devices.

Every case has weights that are the same on all devices, and an order that is
not: were its mark lost, the weights' gradient would be of one device only, or
be summed too early.
"""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

import jaxsparse
from jaxsparse import mesh as mesh_lib
from jaxsparse.ops import shard_map_vma
from jaxsparse.ops.experts import routing
from jaxsparse.ops.experts.expert_mlp import expert_mlp
from jaxsparse.ops.experts.grouped_matmul import assigned_matmul, grouped_matmul
from jaxsparse.ops.memory import value_bag_gradient
from jaxsparse.ops.memory.gathered_dot import gathered_dot
from jaxsparse.ops.memory.row_gradient import row_gradient, sort_references
from jaxsparse.ops.memory.table_exchange import TableExchange, put_back
from jaxsparse.ops.memory.value_bag import value_bag
from jaxsparse.ops.shard_map_vma import argsort, sort_key_val, varying_axes
from jaxsparse.ops.sparse_attention import block_selection
from jaxsparse.ops.sparse_attention.sparse_inputs import SparseOptions
from jaxsparse.ops.top_k import top_m, top_m_reference

# Devices, and of each: tokens, entries, rows, their width, experts.
N, T, k, M, W, X = 2, 4, 3, 8, 4, 4
RNG = np.random.default_rng(0)


def numbers(*shape):
  return RNG.normal(size=shape).astype(np.float32)


def integers(high, *shape):
  return RNG.integers(high, size=shape).astype(np.int32)


# Functions of weights and of a device's own integers or numbers.


def by_argsort(weight, own):
  return weight[argsort(own)] * jnp.arange(1.0, len(weight) + 1)


def by_sort_key_val(weight, own):
  _, place = sort_key_val(own, jnp.arange(len(own)))
  return weight[place] * jnp.arange(1.0, len(weight) + 1)


def by_sorted_values(weight, own):
  """The keys are alike; what goes with them is not."""
  _, place = sort_key_val(jnp.arange(len(own)), own)
  return weight[place] * jnp.arange(1.0, len(weight) + 1)


def by_top_m(best, weight, own):
  values, index = best(own.astype(jnp.float32), 2)
  return jnp.take_along_axis(weight, index, axis=-1) * values


def by_bag(way, weight, own):
  table, weight = weight
  return value_bag(table, own, weight[..., None], table_gradient=way)


def by_products(weight, own):
  table, vector = weight
  return gathered_dot(table, own, vector, table_gradient='sorted')


def by_dispatch(weight, own):
  x, weight = weight
  dispatch = routing.dispatch_order(own, X)
  rows = routing.to_experts(x, dispatch, k)
  gain = jnp.arange(1.0, len(rows) + 1)[:, None]
  return routing.from_experts(rows * gain, weight, dispatch)


def by_expert_mlp(weight, own):
  x, weight, up, down = weight
  return expert_mlp(x, weight, own, dict(up=up, down=down))


def by_pools(weight, own):
  rows, experts = weight
  return grouped_matmul(rows, experts, own, implementation='loop')


def by_assignment(weight, own):
  rows, experts = weight
  return assigned_matmul(rows, experts, own)


def by_blocks(weight, own):
  shares, coverage = weight
  options = SparseOptions(block=4, tile=4, window_blocks=1, max_blocks=2)
  choice = block_selection.select(shares, own > 0, coverage, options)
  kept = jnp.take_along_axis(shares, choice.block, axis=-1)
  return kept * choice.weight


ENTRIES = integers(M, N, T, k)
EXPERTS = integers(X, N, T, k)
BAG = numbers(M, W), numbers(T, k)
CASES = dict(
  argsort=(by_argsort, numbers(M), integers(99, N, M)),
  sort_key_val=(by_sort_key_val, numbers(M), integers(99, N, M)),
  sorted_values=(by_sorted_values, numbers(M), integers(M, N, M)),
  top_m=(functools.partial(by_top_m, top_m), numbers(T, M), numbers(N, T, M)),
  top_m_by_counting=(
    functools.partial(by_top_m, top_m), numbers(512, M), numbers(N, 512, M)
  ),
  top_m_reference=(
    functools.partial(by_top_m, top_m_reference),
    numbers(T, M),
    numbers(N, T, M),
  ),
  **{
    f'bag {way}': (functools.partial(by_bag, way), BAG, ENTRIES)
    for way in value_bag_gradient.ACCUMULATION_MODES
  },
  products=(by_products, (numbers(M, W), numbers(T, W)), ENTRIES),
  dispatch=(by_dispatch, (numbers(T, W), numbers(T, k)), EXPERTS),
  expert_mlp=(
    by_expert_mlp,
    (numbers(T, W), numbers(T, k), numbers(X, W, 5), numbers(X, 5, W)),
    EXPERTS,
  ),
  pools=(
    by_pools,
    (numbers(M, W), numbers(X, W, 5)),
    np.array([[5, 0, 2, 1], [0, 1, 0, 4]], np.int32),
  ),
  assignment=(
    by_assignment, (numbers(M, W), numbers(X, W, 5)), integers(X, N, M)
  ),
  blocks=(
    by_blocks,
    (
      RNG.dirichlet(np.ones(6), size=(1, 2, T)).astype(np.float32),
      np.full((1, 2, T), 0.6, np.float32),
    ),
    integers(2, N, 1, T, 6),
  ),
)  # fmt: skip


def mesh():
  return mesh_lib.make_mesh(1, N, 1, devices=jax.devices()[:N])


def on_each_device(function):
  """The sum over devices of the squares of `function(weight, own)`."""

  def on_device(weight, own):
    y = function(weight, own[0])
    return jax.lax.psum(jnp.square(y).sum(), 'sparse')

  return jax.shard_map(
    on_device, in_specs=(jax.P(), jax.P('sparse')), out_specs=jax.P()
  )


def check_gradients(function, expected, weight, own):
  with jax.set_mesh(mesh()):
    own_placed = jax.device_put(own, jax.P('sparse'))
    weight_placed = jax.device_put(weight, jax.P())
    actual = jax.jit(jax.grad(on_each_device(function)))(
      weight_placed, own_placed
    )

  def loss(weight, own):
    def one(own):
      return jnp.square(expected(weight, own)).sum()

    # In a loop, which compiles faster than a copy for each device.
    return jax.lax.map(one, own).sum()

  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-5, atol=1e-4),
    actual,
    jax.jit(jax.grad(loss))(weight, own),
  )


# What is slow here is a part of a case that is kept.
IN_OTHERS = {'top_m_reference', 'dispatch', 'pools'}


@pytest.mark.parametrize('name', few(CASES.keys() - IN_OTHERS, CASES))
def test_gradients_are_those_of_one_device(name):
  function, weight, own = CASES[name]
  check_gradients(function, function, weight, own)


@pytest.mark.parametrize('is_put_back', [False, True])
def test_rows_of_each_device_where_tokens_are_alike(is_put_back):
  """Gradients through `own_rows` and `put_back`, the tokens not split."""
  exchange = TableExchange(
    mesh_lib.TABLE_LAYOUTS['rows'], dict(data=1, sparse=N, model=1), M
  )
  slot = jax.device_put(integers(M, T, k))
  gain = np.arange(1, k + 1, dtype=np.float32)

  def function(weight, own):
    del own  # The device's number makes its order.
    entries, num_valid, place = exchange.own_rows(
      (slot, weight[..., None], None), M // N
    )
    in_use = jnp.arange(k)[None] < num_valid[:, None]
    y = jnp.where(in_use, entries[1][..., 0], 0)
    return put_back(y, place) * gain[None] if is_put_back else y * in_use

  def expected(weight, own):
    is_own = slot // (M // N) == own
    y = jnp.where(is_own, weight, 0)
    return y * gain[None] if is_put_back else y

  own = np.arange(N, dtype=np.int32)
  check_gradients(function, expected, numbers(T, k), own)


ORDERS = dict(
  argsort=lambda own, _: argsort(own.reshape(-1)),
  keys=lambda own, same: sort_key_val(own.reshape(-1), same.reshape(-1)),
  values=lambda own, same: sort_key_val(same.reshape(-1), own.reshape(-1)),
  top_m=lambda own, _: top_m(own.astype(jnp.float32), 2),
  top_m_reference=lambda own, _: top_m_reference(own.astype(jnp.float32), 2),
  dispatch=lambda own, _: routing.dispatch_order(own, X),
  sorted_bag=lambda own, _: value_bag_gradient._sort(own, None, M)[:2],
  references=lambda own, _: sort_references(own, M),
  row_gradient=lambda own, same: row_gradient(
    sort_references(own, M),
    jnp.ones((*same.shape, 1)),
    jnp.ones((len(same), 1, W)),
    None,
    M,
  ),
)


@pytest.mark.parametrize('name', ORDERS)
def test_an_order_varies_as_what_it_sorts(name):
  seen = []

  def on_device(own, same):
    seen.extend(map(varying_axes, jax.tree.leaves(ORDERS[name](own, same))))
    return own

  with jax.set_mesh(mesh()):
    own = jax.device_put(integers(M, N * T, k), jax.P('sparse'))
    jax.eval_shape(
      jax.shard_map(
        on_device,
        in_specs=(jax.P('sparse'), jax.P()),
        out_specs=jax.P('sparse'),
      ),
      own,
      jax.device_put(integers(M, T, k), jax.P()),
    )
  assert seen
  assert set(seen) == {frozenset({'sparse'})}


def test_nothing_sorts_but_by_what_keeps_the_mark():
  root = pathlib.Path(jaxsparse.__file__).parent
  bare = re.compile(r'(jnp|lax|numpy)\.(argsort|sort_key_val)\(')
  found = {
    str(path.relative_to(root))
    for folder in ('ops', 'kernels', 'nn', 'inference', 'training')
    for path in (root / folder).glob('*.py')
    if bare.search(path.read_text())
  }
  assert found == {str(pathlib.Path(shard_map_vma.__file__).relative_to(root))}
