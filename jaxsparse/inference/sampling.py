"""Choosing the next token from its logits."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How tokens are drawn; the limits apply in the order of the fields."""

  # Divides the logits; 0 takes the likeliest token.
  temperature: float = 1.0
  # Only the k likeliest tokens; 0 for all.
  top_k: int = 0
  # Only the likeliest tokens that are needed to reach this probability.
  top_p: float = 1.0

  def __post_init__(self):
    if not self.temperature >= 0:
      raise UserError(
        f'temperature must not be negative, got {self.temperature}.'
      )
    if self.top_k < 0:
      raise UserError(
        f'top_k must not be negative (0 keeps all tokens), got {self.top_k}.'
      )
    if not 0 < self.top_p <= 1:
      raise UserError(f'top_p must be above 0 and at most 1, got {self.top_p}.')


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
