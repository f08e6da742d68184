import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsparse.ops.top_k import top_m, top_m_reference


@pytest.mark.parametrize('shape', [(1, 5), (7, 40), (2, 3, 2, 129)])
@pytest.mark.parametrize('m', [1, 5])
def test_equals_reference(shape, m):
  scores = jax.random.normal(jax.random.key(0), shape)
  values, indices = top_m(scores, m)
  expected_values, expected_indices = top_m_reference(scores, m)
  np.testing.assert_array_equal(values, expected_values)
  np.testing.assert_array_equal(indices, expected_indices)


def test_stable_mode_keeps_ties_in_order():
  scores = jnp.array([[1.0, 2.0, 2.0, 2.0, 0.0, 2.0]])
  _, indices = top_m(scores, 3, is_stable=True)
  np.testing.assert_array_equal(indices, [[1, 2, 3]])


def test_narrow_scores_are_compared_in_f32():
  scores = jax.random.normal(jax.random.key(0), (4, 64)).astype(jnp.bfloat16)
  assert top_m(scores, 3)[0].dtype == jnp.float32
  compiled = jax.jit(lambda s: top_m(s, 3)).lower(scores).compile()
  assert ' sort(' not in compiled.as_text()
