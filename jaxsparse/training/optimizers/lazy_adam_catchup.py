# SPDX-License-Identifier: Apache-2.0
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

Where b1 nears b2 these steps are so many that epsilon_s may outgrow sqrt(v)
among them: they are then cut into stretches, each with its own middle.

Seen from one n, the tails follow each other by

  tail(t - 1, n) = rho (eta_t c_t D(t, n) + tail(t, n)),

which gives them for the last `HORIZON` steps, under any schedule. The steps
before those make a geometric series for a constant rate: eta_s c_s is taken at
its middle again, which is exact where it is linear.
"""

import dataclasses
import functools
import math
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

# More steps than any run has.
_FOREVER = 2**30


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
    rates = jax.vmap(self.learning_rate)(before.reshape(-1))
    return jnp.asarray(rates, jnp.float32).reshape(step.shape)

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
    log_decay, shift = jnp.zeros(gap.shape), 0.0
    if long_log_decay is not None:
      log_decay = jnp.where(
        gap <= HORIZON,
        recent.log_decay[jnp.clip(gap, 0, HORIZON)],
        long_log_decay,
      )
      shift = jnp.expm1(log_decay)[:, None] * params
    tails, epsilons = self._stretches(last, gap, recent, log_decay)
    for tail, epsilon in zip(tails, epsilons, strict=True):
      shift -= tail[:, None] * mu / (jnp.sqrt(nu) + epsilon[:, None])
    gap_f32 = gap.astype(jnp.float32)[:, None]
    return shift, mu * self.b1**gap_f32, nu * self.b2**gap_f32

  def _stretches(self, last, gap, recent, log_decay):
    """Tail and epsilon' of each stretch of missed steps, [stretches, U] each.

    Args:
      last: step before the missed ones [U].
      gap: number of missed ones.
      recent: of the step up to which they are.
      log_decay: of all missed ones.
    """
    # A stretch is what follows `first` missed steps, up to `end` of them.
    bounds = np.array(self._bounds())
    first = jnp.minimum(bounds[:-1, None], gap[None])
    end = jnp.minimum(bounds[1:, None], gap[None])
    _, middle = _geometric(-self._log_rho, end - first)
    middle += first + 1
    epsilon = self.epsilon * jnp.sqrt(1 - self.b2 ** (last[None] + middle))
    epsilon = epsilon * self.b2 ** (-middle / 2)
    num_old = jnp.maximum(gap - HORIZON, 0)[None]

    def from_recent(missed):
      missed = jnp.maximum(missed, num_old)
      power = jnp.exp(self._log_rho * missed)
      return power * recent.tail[jnp.clip(gap[None] - missed, 0, HORIZON)]

    tail = from_recent(first) - from_recent(end)
    first, end = jnp.minimum(first, num_old), jnp.minimum(end, num_old)
    tail += self._old_tail(first, end - first, last[None], log_decay[None])
    return tail, epsilon

  def _old_tail(self, first, count, last, log_decay):
    """The tail of `count` steps after `first`, all before the horizon."""
    _, middle = _geometric(-self._log_rho, count)
    middle = jnp.round(middle).astype(jnp.int32)
    each = self.log_decay(last + first + 1 + middle)
    # Of the steps after `first`.
    log_decay += count * each - jnp.cumsum(count * each, axis=0)
    # From one step to the next momentum fades, but less decay is to come.
    ratio = self._log_rho - each
    is_fading = ratio < 0
    total, middle = _geometric(jnp.abs(ratio), count)
    middle = jnp.where(is_fading, 1 + middle, count - middle)
    middle = last + first + jnp.round(middle).astype(jnp.int32)
    largest = ratio * jnp.where(is_fading, 1, count)
    total *= jnp.exp(self._log_rho * first + largest + log_decay)
    return jnp.where(count > 0, self._size(middle) * total, 0.0)

  def _bounds(self) -> list[int]:
    """Numbers of missed steps at which a stretch ends and another begins.

    One stretch where momentum is short. Else stretches that double in length,
    as c_s changes fastest at first, while epsilon_s grows by less than sqrt(e)
    in each; until momentum is gone or a root of 1,000 is small beside it.
    """
    growth = -0.5 * math.log(self.b2)
    lasting = -1 / self._log_rho
    bounds, length = [0], 8
    if lasting > min(0.4 / growth, 64):
      end = min(5 * lasting, math.log(1e3 / self.epsilon) / growth)
      while bounds[-1] < end:
        bounds.append(bounds[-1] + max(1, min(length, round(0.5 / growth))))
        length *= 2
    return [*bounds, _FOREVER]

  @property
  def _rho(self) -> float:
    return self.b1 / self.b2**0.5

  @property
  def _log_rho(self) -> float:
    return math.log(max(self._rho, 1e-30))

  def _size(self, step):
    """eta c of steps."""
    step = jnp.maximum(step, 1)
    correction = jnp.sqrt(1 - self.b2**step) / (1 - self.b1**step)
    return self.rate(step) * correction


def _geometric(rate, count):
  """Of exp(-rate i) for i from 0 to count - 1: the sum, and the mean i."""
  rate = jnp.maximum(rate, 1e-12)
  count = count.astype(jnp.float32)
  whole = rate * count
  total = jnp.expm1(-whole) / jnp.expm1(-rate)
  is_flat = whole < 1e-2
  steep = 1 / jnp.expm1(rate) - count / jnp.expm1(jnp.where(is_flat, 1, whole))
  flat = (count - 1) / 2 - rate * (jnp.square(count) - 1) / 12
  return total, jnp.where(is_flat, flat, steep)


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
