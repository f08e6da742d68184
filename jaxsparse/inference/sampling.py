# SPDX-License-Identifier: Apache-2.0
"""Choosing the next token from its logits."""

import dataclasses
import functools
import numbers

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.config.errors import require

# Temperatures by which float32 logits can be divided: beyond them the quotient
# overflows, or the divisor is taken for 0.
_LOWEST, _HIGHEST = 1e-30, 1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How tokens are drawn; the limits apply in the order of the fields.

  Raises:
    UserError: a limit is no number, or outside of what it may be.
  """

  # Divides the logits; 0 takes the likeliest token.
  temperature: float = 1.0
  # Only the k likeliest tokens; 0 for all.
  top_k: int = 0
  # Only the likeliest tokens that are needed to reach this probability.
  top_p: float = 1.0

  def __post_init__(self):
    temperature, top_k, top_p = self.temperature, self.top_k, self.top_p
    require(
      isinstance(temperature, numbers.Real)
      and (temperature == 0 or _LOWEST <= temperature <= _HIGHEST),
      'temperature must be 0, for the likeliest token, or within '
      f'{_LOWEST} and {_HIGHEST}, got {temperature}.',
    )
    require(
      isinstance(top_k, numbers.Integral) and top_k >= 0,
      f'top_k must be a whole number of tokens, or 0 to keep all, got {top_k}.',
    )
    require(
      isinstance(top_p, numbers.Real) and 0 < top_p <= 1,
      f'top_p must be above 0 and at most 1, got {top_p}.',
    )


@functools.partial(jax.jit, static_argnames='sampling')
def sample(
  logits: Float[Array, 'B V'], key: jax.Array, sampling: Sampling
) -> Int[Array, 'B']:
  """Draws one token for each row, with randomness of the row's own.

  A row's token depends on its own logits and index only, not on how many rows
  there are.

  Args:
    logits: scores of the next token.
    key: PRNG key of this step.
    sampling: the limits; a static argument.

  Returns:
    Token ids, int32.
  """
  logits = logits.astype(jnp.float32)
  if sampling.temperature == 0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  logits = logits / sampling.temperature
  rows = jnp.arange(logits.shape[0])
  keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
  draw = jax.vmap(jax.random.categorical)
  if not sampling.top_k and sampling.top_p == 1:
    return draw(keys, logits).astype(jnp.int32)
  num_kept = min(sampling.top_k or logits.shape[1], logits.shape[1])
  logits, tokens = jax.lax.top_k(logits, num_kept)
  choice = draw(keys, keep_top_p(logits, sampling.top_p))
  return jnp.take_along_axis(tokens, choice[:, None], axis=1)[:, 0]


def keep_top_p(
  logits: Float[Array, 'B k'], top_p: float
) -> Float[Array, 'B k']:
  """Nucleus of Holtzman et al. 2020 (arXiv:1904.09751), section 3.1.

  Args:
    logits: in falling order.
    top_p: the smallest set of tokens with at least this probability is kept,
      and always the first token.

  Returns:
    The logits, -inf where a token is not kept.
  """
  probability = jax.nn.softmax(logits, axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  # Rounding leaves `before` of the first token within one ulp of 0, either way.
  is_kept = (before < top_p).at[:, 0].set(True)
  return jnp.where(is_kept, logits, -jnp.inf)
