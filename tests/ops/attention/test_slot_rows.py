# SPDX-License-Identifier: Apache-2.0
"""Rows of a cache that are written in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import arrays_of_size

from jaxsparse.ops.attention.slot_rows import write_all, write_rows

K, S, H = 2, 256, 4


@pytest.mark.parametrize('has_slots', [False, True])
def test_a_step_of_one_sequence_copies_no_cache(has_slots):
  def step(old, rows, index, query):
    write = write_rows if has_slots else write_all
    new = write(old, rows, index, 2)
    return new, jnp.einsum('bkh,bksh->bks', query, new)

  rng = np.random.default_rng(0)
  old, rows, query = (
    jnp.asarray(rng.normal(size=shape), jnp.float32)
    for shape in ((1, K, S, H), (1, K, 1, H), (1, K, H))
  )
  index = jnp.full(1, S - 1) if has_slots else jnp.int32(S - 1)
  compiled = (
    jax.jit(step, donate_argnums=0).lower(old, rows, index, query).compile()
  )
  assert not arrays_of_size(compiled.as_text(), 'copy', old.size)
  assert compiled.memory_analysis().temp_size_in_bytes < old.nbytes
  expected = np.array(old)
  expected[:, :, -1] = rows[:, :, 0]
  new, scores = compiled(old, rows, index, query)
  np.testing.assert_array_equal(new, expected)
  np.testing.assert_allclose(
    scores, np.einsum('bkh,bksh->bks', query, expected), rtol=1e-5
  )
