# SPDX-License-Identifier: Apache-2.0
"""How a GPU selects: by a kernel made for it, not by sorting all candidates.

Run with `pytest -m aot`, extra `aot`. A TPU has no such kernel and sorts.
"""

import jax
import jax.numpy as jnp
import pytest
import targets

from jaxsparse.ops import top_k
from jaxsparse.ops.top_k import top_m

pytestmark = pytest.mark.aot


def _program(dtype, num_candidates=1792, num_selected=42, **options):
  scores = jax.ShapeDtypeStruct((8, 64, num_candidates), dtype)
  return targets.compile_for(
    'h100', lambda x: top_m(x, num_selected, **options), scores
  )


@pytest.mark.skipif(
  not top_k.CAN_BE_UNSTABLE,
  reason='Before JAX 0.11 top_k is always stable, and stable is a full sort.',
)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('sizes', [(1792, 42), (1764, 42), (1024, 128)])
def test_gpu_selects_without_a_sort(dtype, sizes):
  program = _program(dtype, *sizes)
  assert ' sort(' not in program.text
  assert 'custom-call' in program.text


def test_gpu_sorts_all_candidates_for_a_stable_order():
  assert ' sort(' in _program(jnp.float32, is_stable=True).text
