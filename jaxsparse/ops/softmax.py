"""A softmax whose gradient is as fast as itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def softmax(scores: Float[Array, '*B S']) -> Float[Array, '*B S']:
  """`jax.nn.softmax` over the last axis.

  Its gradient keeps the result and sums, on a CPU, by a matmul: XLA's sum of a
  product takes there four times as long as all the rest (JAX 0.10.2).
  """
  return jax.nn.softmax(scores, axis=-1)


def _save(scores):
  shares = softmax(scores)
  return shares, shares


def _restore(shares, cotangent):
  total = jax.lax.platform_dependent(
    shares,
    cotangent,
    cpu=lambda x, y: jnp.einsum('...s,...s->...', x, y),
    default=lambda x, y: (x * y).sum(-1),
  )
  return (shares * (cotangent - total[..., None]),)


softmax.defvjp(_save, _restore)
