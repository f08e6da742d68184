"""Initial parameters of an UltraMem layer, and where their scales come from.

`release` is the fixed set of scales of the published code. `paper` is the rule
of arXiv:2411.12364: seen as an MLP of which m * P neurons fire, the layer
should write 1 / (2 L) of variance into the residual stream, and the kept
scores should average about 1, which needs to know how far above the others the
best m of Q scores are.

Letters: D model width, k query width, w key width, Q logical keys per axis,
P heads, r ranks, c cores, E virtual blocks, M slots, W value width, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
import scipy.special

from jaxsparse import mesh
from jaxsparse.config import MemoryConfig


@functools.lru_cache
def _top_means(num_candidates: int, num_selected: int) -> np.ndarray:
  """Expected values of the m largest of n normal draws, largest first.

  The i-th largest has the density n phi(x) P(i - 1 of n - 1 draws are above x),
  integrated numerically; the integrand is smooth and vanishes at both ends, so
  that the trapezoidal rule is exact to rounding.
  """
  x = np.linspace(-10, 10, 2001)
  density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
  above = scipy.special.ndtr(-x)
  at_most = [
    scipy.special.bdtr(i, num_candidates - 1, above)
    for i in range(num_selected)
  ]
  exactly = np.diff(at_most, axis=0, prepend=0)
  return np.sum(num_candidates * x * density * exactly, axis=1) * (x[1] - x[0])


def expected_top_mean(num_candidates: int, num_selected: int) -> float:
  """E[Y]: the expected mean of the m largest of n normal draws."""
  return float(_top_means(num_candidates, num_selected).mean())


def expected_cell_mean(num_candidates: int, num_selected: int) -> float:
  """Mean of the m largest products of one of m rows and one of m columns.

  The rows and columns are the m best of n normal draws each, at their expected
  values: the score that a rank-1 core of singular value 1 gives to kept cells.
  """
  best = _top_means(num_candidates, num_selected)
  return float(np.sort(np.outer(best, best), axis=None)[-num_selected:].mean())


@dataclasses.dataclass(frozen=True)
class InitialScales:
  """Standard deviations, constants and ranges of the initial parameters."""

  query: float
  query_scale: float
  keys: float
  key_scale: float
  cores: float
  values: float
  output: float


def initial_scales(
  config: MemoryConfig, model_dim: int, num_layers: int
) -> InitialScales:
  """The scales of `config.init`.

  With `paper` a rank score has variance 1 / E[Y], the product of two of them
  1 / E[Y]^2. What is left to make the kept scores average 1 is the core, about
  which the paper is silent. Its entries are uniform in [0, s], as in the
  release, and a sum of c such cores is close to a rank-1 core of singular
  value c r s / 2; hence s = 2 E[Y] / (r * expected_cell_mean).

  Measured over 24 draws of the cores (D 768, P 2, c 2, r 2, E 4), mean of the
  kept scores: 1.09 at Q 1616, k 192, m 80; 1.01 at Q 1138, k 128, m 32; 1.02 at
  Q 256, k 32, m 16. One draw differs from the mean by 0.14, one score by 0.35,
  so that the output variance is 1.15 to 1.3 times the 1 / (2 L) aimed at.
  """
  key_dim = config.key_dim
  if config.split_key_dim:
    key_dim //= config.tucker_rank
  output = (config.expansion * config.value_dim) ** -0.5
  if config.init == 'release':
    return InitialScales(
      query=config.key_dim**-0.5,
      query_scale=config.key_dim**-0.33,
      keys=key_dim**-0.5,
      key_scale=key_dim**-0.33,
      cores=1.0,
      values=0.02,
      output=output,
    )
  sizes = config.num_logical_keys, config.num_selected
  mean = expected_top_mean(*sizes)
  reads = config.num_selected * config.num_heads
  return InitialScales(
    query=model_dim**-0.5,
    query_scale=mean**-0.5,
    keys=key_dim**-0.5,
    key_scale=key_dim**-0.5,
    cores=2 * mean / (config.tucker_rank * expected_cell_mean(*sizes)),
    values=(config.expansion / (2 * reads * num_layers)) ** 0.5,
    output=output,
  )


def parameters(
  config: MemoryConfig,
  model_dim: int,
  num_layers: int,
  scheme: str = 'columns',
) -> dict[str, tuple[Callable, jax.P | None, tuple[int, ...]]]:
  """Initializer, sharding and shape of every parameter.

  Args:
    config: of the layer.
    model_dim: width D.
    num_layers: blocks L of the model.
    scheme: of the value table: 'columns', 'rows' or 'grid'.
  """
  scales = initial_scales(config, model_dim, num_layers)
  normal, constant = nn.initializers.normal, nn.initializers.constant
  param = mesh.param
  k, r, P = config.key_dim, config.tucker_rank, config.num_heads
  E, W, M = config.expansion, config.value_dim, config.table_rows
  w = k // r if config.split_key_dim else k
  Q, taps = config.num_logical_keys, config.query_conv_taps
  declared = {
    'query': (normal(scales.query), param('D..'), (model_dim, 2, k)),
    'query_scale': (constant(scales.query_scale), param('.'), (k,)),
    'keys': (normal(scales.keys), param('.....'), (P, 2, Q, w, r)),
    'key_scale': (constant(scales.key_scale), param('.'), (w,)),
    'cores': (
      nn.initializers.uniform(scales.cores),
      param('....'),
      (config.num_cores, P, r, r),
    ),
    'value_table': (
      normal(scales.values, config.value_dtype),
      mesh.table(scheme),
      (M, W),
    ),
    'output': (normal(scales.output), param('.WD'), (E, W, model_dim)),
  }
  if taps > 0:
    conv = (normal(taps**-0.5), param('.D'), (taps, model_dim))
    declared['query_conv'] = conv
  return declared
