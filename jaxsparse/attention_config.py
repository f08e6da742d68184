"""The attention's part of the configuration, see `config`."""

import dataclasses

from jaxsparse.errors import require, require_choice, require_positive


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class DCMHAConfig:
  """Dynamically composable heads, see `ops.compose`."""

  # Compose scores before the softmax, and weights after it.
  pre: bool = True
  post: bool = True
  # Factors of the queries' tokens, and of the keys', which decoding caches.
  query_wise: bool = True
  key_wise: bool = True
  # A learned matrix that is the same for all pairs, beside the identity.
  base: bool = False
  # Rank R of what a token generates.
  rank: int = 2
  # Groups G of neighbouring heads that mix among themselves: 1 for all heads,
  # the number of key/value heads to mix within each one's query heads. If the
  # mesh axis `model` divides it, that axis splits the groups.
  num_groups: int = 1
  # GELU of the generator: 'tanh', or 'erf' as in the PyTorch port.
  gelu: str = 'tanh'
  # 'default', or 'identity', which begins as plain attention, exactly: for a
  # model that was trained without.
  init: str = 'default'

  def __post_init__(self):
    require_positive(self, 'rank', 'num_groups')
    require_choice(self, 'gelu', ('tanh', 'erf'))
    require_choice(self, 'init', ('default', 'identity'))
    require(
      self.pre or self.post,
      'pre and post are both off: set one of them, or no dcmha at all.',
    )
    require(
      self.query_wise or self.key_wise or self.base,
      'query_wise, key_wise and base are all off: set one of them, or no dcmha '
      'at all.',
    )

  @property
  def streams(self) -> tuple[tuple[str, str], ...]:
    """What the generator makes, in the order of the official checkpoints."""
    return tuple(
      (place, side)
      for place in ('pre', 'post')
      for side in ('query', 'key')
      if getattr(self, place) and getattr(self, f'{side}_wise')
    )

  @property
  def num_cached(self) -> int:
    """Streams of the keys' tokens."""
    return sum(side == 'key' for _, side in self.streams)

  @property
  def num_factors(self) -> int:
    """Numbers of a stream for each head: reading, writing, and the gate."""
    return 2 * self.rank + 1


def query_wise_dcmha(**fields) -> DCMHAConfig:
  """Factors of the queries only: decoding caches no more than without."""
  return DCMHAConfig(**(dict(key_wise=False) | fields))
