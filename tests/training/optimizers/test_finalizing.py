# SPDX-License-Identifier: Apache-2.0
"""The third function of optimizers, through all that wraps them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxsparse.ops.memory.row_gradient import RowGradient
from jaxsparse.training.optimizers import finalizing
from jaxsparse.training.optimizers.row_optimizers import row_adagrad, row_adam
from jaxsparse.training.optimizers.row_updates import (
  apply_updates,
  with_float32_master,
)

LABELS = {'a': {'table': 'rows', 'matrix': 'rest'}}


def after_two_steps(table_optimizer, dtype):
  """Of a table whose row 1 gets a gradient, and then row 0."""
  optimizer = finalizing.partition(
    {'rows': table_optimizer, 'rest': optax.sgd(0.5)}, LABELS
  )

  # In one program: by itself each operation is one more to compile.
  @jax.jit
  def run():
    params = {
      'a': {
        'table': jnp.ones((3, 2), dtype),
        'matrix': jnp.ones((2, 2)),
      }
    }
    state = optimizer.init(params)
    for row in (1, 0):
      rows = RowGradient(jnp.array([row, 3]), jnp.ones((2, 2)))
      grads = {'a': {'table': rows, 'matrix': jnp.ones((2, 2))}}
      updates, state = optimizer.update(grads, state, params)
      params = apply_updates(params, updates)
    return params, state

  return optimizer, *run()


@jax.jit
def two_steps_of_adam():
  dense, adam = jnp.ones((3, 2)), optax.adam(0.1)
  state = adam.init(dense)
  for row in (1, 0):
    updates, state = adam.update(jnp.zeros((3, 2)).at[row].set(1.0), state)
    dense += updates
  return dense


def test_a_group_is_finalized_by_its_own_transformation():
  optimizer, params, state = after_two_steps(row_adam(0.1), jnp.float32)
  final, final_state = jax.jit(optimizer.finalize)(params, state)
  dense = np.asarray(two_steps_of_adam())
  # Row 1 owes the second step's momentum.
  assert abs(params['a']['table'] - dense)[1].max() > 1e-2
  np.testing.assert_allclose(final['a']['table'], dense, atol=1e-5)
  np.testing.assert_array_equal(final['a']['matrix'], params['a']['matrix'])
  assert jax.tree.structure(final_state) == jax.tree.structure(state)
  kept = finalizing.state_of(final_state, 'rows')
  np.testing.assert_array_equal(kept.touched['a']['table'], [2, 2, 2])


def test_a_master_is_finalized_and_its_parameters_are_its_rounding():
  wrapped = with_float32_master(row_adam(0.1))
  optimizer, params, state = after_two_steps(wrapped, jnp.bfloat16)
  final, final_state = jax.jit(optimizer.finalize)(params, state)
  master = finalizing.state_of(final_state, 'rows').master['a']['table']
  table, master = map(np.asarray, (final['a']['table'], master))
  assert (table.dtype, master.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_array_equal(table, master.astype(jnp.bfloat16))
  assert np.any(table[1] != np.asarray(params['a']['table'])[1])


def test_what_leaves_nothing_for_later_is_unchanged():
  for inner in (row_adagrad(0.1), row_adam(0.1, catch_up=False)):
    optimizer, params, state = after_two_steps(inner, jnp.float32)
    assert optimizer.finalize(params, state) == (params, state)
    assert with_float32_master(inner).is_final
  assert finalizing.as_optimizer(optax.adam(0.1)).is_final
