# SPDX-License-Identifier: Apache-2.0
"""The bag in one kernel, interpreted on a CPU, is the reference's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse import mesh
from jaxsparse.ops.kernels import bag as kernel
from jaxsparse.ops.kernels import probe
from jaxsparse.ops.memory.value_bag import value_bag, value_bag_reference
from jaxsparse.ops.tables.quantized_table import encoded

M, W, T, K, E = 40, 96, 3, 5, 4


def make_inputs(num_cores, has_pools):
  rng = np.random.default_rng(0)
  table = jnp.asarray(rng.normal(size=(M, W)), jnp.float32)
  slot = jnp.asarray(rng.integers(M, size=(T, K)), jnp.int32)
  weight = jnp.asarray(rng.normal(size=(T, K, num_cores)), jnp.float32)
  pool = jnp.asarray(rng.integers(E, size=(T, K)), jnp.int32)
  return table, slot, weight, pool if has_pools else None


@pytest.mark.parametrize(
  ('stored', 'num_cores', 'has_pools', 'rows_at_once'),
  few(
    [('float32', 2, True, 4), ('int4', 1, False, 128)],
    [
      ('float32', 2, True, 4),
      ('int4', 1, False, 128),
      ('int8', 2, True, 128),
      ('bfloat16', 3, False, 2),
    ],
  ),
)
def test_it_is_the_reference(
  stored, num_cores, has_pools, rows_at_once, monkeypatch
):
  monkeypatch.setattr(kernel, '_ROWS', rows_at_once)
  table, *reads = make_inputs(num_cores, has_pools)
  num_pools = E if has_pools else 1
  if stored.startswith('int'):
    # In three parts, each with a scale of its own.
    table = encoded(table, stored, 3)
  else:
    table = table.astype(stored)

  @jax.jit
  def both(table, *reads):
    numbers = table.dequantized() if stored.startswith('int') else table
    return (
      kernel.bag(table, *reads, num_pools, interpret=True),
      value_bag_reference(numbers, *reads, num_pools),
    )

  assert 'this is cpu' in str(kernel.unsupported_reason(table, *reads))
  got, expected = both(table, *reads)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def on_gpu(monkeypatch):
  """As if this were one, on which all kernels compile."""
  monkeypatch.setattr(mesh, 'platform', lambda: 'gpu')
  monkeypatch.setattr(probe, 'first_error', lambda *args: None)
  probe._compilation_error.cache_clear()
  yield
  probe._compilation_error.cache_clear()


def test_what_it_does_not_serve(on_gpu):
  table, slot, weight, _ = make_inputs(12, has_pools=False)

  def why(table=table, slot=slot, num_cores=1):
    return str(kernel.unsupported_reason(table, slot, weight[..., :num_cores]))

  assert why() == 'None'
  assert 'int8 or int4' in why(encoded(table, 'float8'))
  assert 'scales inside' in why(encoded(table, 'int8').with_scales_apart())
  assert 'float8_e4m3fn' in why(table.astype(jnp.float8_e4m3fn))
  assert 'narrow' in why(num_cores=12)
  many = jnp.zeros((1, 513), jnp.int32)
  none = jnp.zeros((1, 513, 1))
  assert '513 rows' in str(kernel.unsupported_reason(table, many, none))


def test_value_bag_takes_it_where_it_runs(on_gpu, monkeypatch):
  """A GPU's branch is traced, and not compiled here."""

  def uses_kernel(num_rows):
    # Of another size each time: what was traced is kept.
    _, *reads = make_inputs(2, has_pools=True)
    table = jnp.zeros((num_rows, W))
    jaxpr = jax.make_jaxpr(lambda *x: value_bag(*x, num_pools=E))(table, *reads)
    return 'name=bag' in str(jaxpr)

  assert uses_kernel(M)
  monkeypatch.undo()
  monkeypatch.setattr(mesh, 'platform', lambda: 'gpu')
  probe._compilation_error.cache_clear()
  # The probe compiles it, which a CPU does not.
  assert not uses_kernel(M + 1)
