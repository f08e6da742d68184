# SPDX-License-Identifier: Apache-2.0
"""What a bench turns off while a program is traced, to see what it brings."""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax

from jaxsparse.ops import top_k
from jaxsparse.ops.kernels import attend, bag, few_experts, retrieve

KERNELS = dict(
  attend=attend, bag=bag, few_experts=few_experts, retrieve=retrieve
)


@contextlib.contextmanager
def without(*names: str, cuts_graphs: bool = False) -> Iterator[None]:
  """What is traced meanwhile has XLA's forms for some kernels.

  Args:
    names: of `KERNELS`.
    cuts_graphs: selections leave the order of equal scores to the backend: from
      JAX 0.11 on that is a kernel of a GPU which ends a CUDA graph.
  """
  # Functions that were traced otherwise are not to be taken for these.
  jax.clear_caches()
  with contextlib.ExitStack() as stack:
    for name in names:
      off = mock.patch.object(
        KERNELS[name], 'unsupported_reason', return_value='it is turned off'
      )
      stack.enter_context(off)
    stack.enter_context(
      mock.patch.object(top_k, 'KEEPS_GRAPHS', not cuts_graphs)
    )
    yield
  jax.clear_caches()
