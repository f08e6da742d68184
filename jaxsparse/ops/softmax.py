# SPDX-License-Identifier: Apache-2.0
"""A softmax whose gradient is as fast as itself."""

import jax
from jaxtyping import Array, Float

from jaxsparse.ops import cpu


@jax.custom_vjp
def softmax(scores: Float[Array, '*B S']) -> Float[Array, '*B S']:
  """`jax.nn.softmax` over the last axis; its gradient keeps the result."""
  return jax.nn.softmax(scores, axis=-1)


def _save(scores):
  shares = softmax(scores)
  return shares, shares


def _restore(shares, cotangent):
  total = cpu.row_sums(shares * cotangent)
  return (shares * (cotangent - total[..., None]),)


softmax.defvjp(_save, _restore)
