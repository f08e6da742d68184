"""What dense AdamW does to a row while the row gets no gradient.

From step t, the row's last, to step n its moments decay, and with them as they
were after step t every step s between them moves its parameters by

  p_s = (1 - eta_s lambda) p_{s-1} - eta_s u_s,
  u_s = c_s rho^(s-t) m / (sqrt(v) + epsilon_s),
  rho = b1 / sqrt(b2),  c_s = sqrt(1 - b2^s) / (1 - b1^s),
  epsilon_s = epsilon sqrt(1 - b2^s) b2^(-(s-t)/2).

Only epsilon_s keeps the sum over s from being one number times m / sqrt(v).
It differs little over the few steps, around 1 / (1 - rho), in which u_s is not
yet small, so it is taken from their middle: exact if epsilon is small beside
sqrt(v), and in the other extreme off by the share that b2 takes in so many
steps. With D the product of (1 - eta lambda), the row is thus moved to

  p_n = D(t, n) p_t - tail(t, n) m / (sqrt(v) + epsilon'),
  tail(t, n) = sum over s of eta_s c_s rho^(s-t) D(s, n).

Seen from one n, the tails follow each other by

  tail(t - 1, n) = rho (eta_t c_t D(t, n) + tail(t, n)),

which gives them for the last `HORIZON` steps, under any schedule. For older t
the tail is over: eta_s c_s is taken at the middle again, which is exact where
it is linear, and the rest is a geometric series.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

# Steps back from now for which tails and decays are summed step by step, in
# as many blocks as a block is long.
_BLOCK = 32
HORIZON = _BLOCK**2


class Recent(NamedTuple):
  """By the number of missed steps, 0 to `HORIZON`, up to the current one."""

  tail: Float[Array, 'H']
  log_decay: Float[Array, 'H']


@dataclasses.dataclass(frozen=True)
class MissedSteps:
  """AdamW's hyperparameters, and what follows for absent rows."""

  learning_rate: optax.ScalarOrSchedule
  b1: float
  b2: float
  epsilon: float
  weight_decay: float

  def rate(self, step: Int[Array, '*S']) -> Float[Array, '*S']:
    """Learning rate of steps, counted from 1 on."""
    if not callable(self.learning_rate):
      return jnp.full(step.shape, self.learning_rate, jnp.float32)
    before = jnp.maximum(step, 1) - 1
    schedule = self.learning_rate
    rates = jax.vmap(schedule)(before) if step.ndim else schedule(before)
    return jnp.asarray(rates, jnp.float32)

  def log_decay(self, step: Int[Array, '*S']) -> Float[Array, '*S']:
    """log(1 - rate * weight_decay) of steps, counted from 1 on; 0 of step 0."""
    log_decay = jnp.log1p(-self.rate(step) * self.weight_decay)
    return jnp.where(step > 0, log_decay, 0.0)

  def recent(self, step: Int[Array, '']) -> Recent:
    """Tails and decays of rows up to `step`, by how many steps they missed."""
    steps = step - jnp.arange(HORIZON)
    log_decay = _running_sums(self.log_decay(steps), 1.0)
    # By missed steps from none on; force is that of the first missed one.
    log_decay = jnp.concatenate([jnp.zeros(1), log_decay])
    force = self._size(steps) * jnp.exp(log_decay[:-1])
    force = jnp.where(steps > 0, force, 0.0)
    tail = self._rho * _running_sums(force, self._rho)
    return Recent(jnp.concatenate([jnp.zeros(1), tail]), log_decay)

  def catch_up(
    self,
    params: Float[Array, 'U W'],
    mu: Float[Array, 'U W'],
    nu: Float[Array, 'U W'],
    last: Int[Array, 'U'],
    step: Int[Array, ''],
    recent: Recent,
    long_log_decay: Float[Array, 'U'] | None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Brings rows to where `step` would have left them.

    Args:
      params: rows, in f32.
      mu: their first moments, as of their last step.
      nu: their second moments.
      last: their last step; 0 if there was none.
      step: the step to bring them to.
      recent: of this step.
      long_log_decay: summed `log_decay` of the missed steps, for rows that
        missed more than `HORIZON`; None without weight decay.

    Returns:
      What to add to the parameters, and the decayed moments.
    """
    gap = step - last
    is_recent = gap <= HORIZON
    at = jnp.clip(gap, 0, HORIZON)
    tail = jnp.where(is_recent, recent.tail[at], self._whole_tail(last))
    middle = jnp.minimum((gap + 1) / 2, 1 / (1 - self._rho))
    epsilon = self.epsilon * jnp.sqrt(1 - self.b2 ** (last + middle))
    epsilon = epsilon * self.b2 ** (-middle / 2)
    shift = 0.0
    if long_log_decay is not None:
      log_decay = jnp.where(is_recent, recent.log_decay[at], long_log_decay)
      tail = jnp.where(is_recent, tail, tail * jnp.exp(log_decay))
      shift = jnp.expm1(log_decay)[:, None] * params
    shift -= tail[:, None] * mu / (jnp.sqrt(nu) + epsilon[:, None])
    gap_f32 = gap.astype(jnp.float32)[:, None]
    return shift, mu * self.b1**gap_f32, nu * self.b2**gap_f32

  @property
  def _rho(self) -> float:
    return self.b1 / self.b2**0.5

  def _size(self, step):
    """eta c of steps."""
    step = jnp.maximum(step, 1)
    correction = jnp.sqrt(1 - self.b2**step) / (1 - self.b1**step)
    return self.rate(step) * correction

  def _whole_tail(self, last):
    """The tail after step `last` to its end, before the decay from `last`."""
    length = round(1 / (1 - self._rho))
    middle = last + length
    since = jnp.exp(-length * self.log_decay(middle))
    return self._rho / (1 - self._rho) * self._size(middle) * since


def _running_sums(x: Float[Array, 'H'], factor: float) -> Float[Array, 'H']:
  """y[i] = x[i] + factor * y[i - 1], within blocks and then over them."""
  power = np.arange(_BLOCK)[:, None] - np.arange(_BLOCK)[None]

  def weights(factor, first):
    return jnp.asarray(
      np.where(power >= first, factor ** np.maximum(power - first, 0), 0),
      jnp.float32,
    )

  matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  within = matmul(x.reshape(_BLOCK, _BLOCK), weights(factor, 0).T)
  before = matmul(weights(factor**_BLOCK, 1), within[:, -1])
  reach = jnp.asarray(factor ** np.arange(1, _BLOCK + 1), jnp.float32)
  return (within + before[:, None] * reach[None]).reshape(-1)
