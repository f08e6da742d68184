# SPDX-License-Identifier: Apache-2.0
"""Initial parameters of a memory layer, and where their scales come from.

`paper` is the rule of arXiv:2411.12364: seen as an MLP of which k * P neurons
fire, the layer should write 1 / (2 L) of variance into the residual stream, and
the kept scores should average about 1, which needs to know how far above the
others the best k of Q scores are. `matched` is that of UltraMemV2
(arXiv:2508.18756, Eq. 26): the layer writes what the MLP beside it writes.
`release` is the fixed sets of scales of the code published with both, and
`product_keys` what PKM (arXiv:1907.05242) and its heirs start from.

Letters: D model width, q query width, w key width, Q logical keys per axis,
P heads, r ranks, c cores, E virtual blocks or pools, M rows, W value width,
U pre-value width, L layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np

from jaxsparse import mesh
from jaxsparse.config import MemoryConfig


@functools.lru_cache
def _top_means(num_candidates: int, num_selected: int) -> np.ndarray:
  """Expected values of the k largest of n normal draws, largest first.

  The i-th largest has the density n phi(x) P(i - 1 of n - 1 draws are above x),
  integrated numerically; the integrand is smooth and vanishes at both ends, so
  that the trapezoidal rule is exact to rounding.
  """
  # Beyond, a probability of float64 is 0 or 1.
  x = np.linspace(-8, 8, 2001)
  density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
  above, below = (
    np.log([math.erfc(sign * v / math.sqrt(2)) / 2 for v in x])
    for sign in (1, -1)
  )
  others = num_candidates - 1
  exactly = np.stack(
    [
      np.exp(_log_choose(others, i) + i * above + (others - i) * below)
      for i in range(num_selected)
    ]
  )
  return np.sum(num_candidates * x * density * exactly, axis=1) * (x[1] - x[0])


def _log_choose(n: int, k: int) -> float:
  return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def expected_top_mean(num_candidates: int, num_selected: int) -> float:
  """E[Y]: the expected mean of the k largest of n normal draws."""
  return float(_top_means(num_candidates, num_selected).mean())


def expected_cell_mean(num_candidates: int, num_selected: int) -> float:
  """Mean of the k largest products of one of k rows and one of k columns.

  The rows and columns are the k best of n normal draws each, at their expected
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
  pre_values: float
  pre_value_map: float


def initial_scales(
  config: MemoryConfig, model_dim: int, num_layers: int
) -> InitialScales:
  """The scales of `config.init`.

  With `paper` and `matched` a rank score has variance 1 / E[Y], the product of
  two of them 1 / E[Y]^2. What is left to make the kept scores average 1 is the
  core, about which the papers are silent. Its entries are uniform in [0, s], as
  in the release, and a sum of c such cores is close to a rank-1 core of
  singular value c r s / 2; hence s = 2 E[Y] / (r * expected_cell_mean).

  Measured over 24 draws of the cores (D 768, P 2, c 2, r 2, E 4), mean of the
  kept scores: 1.09 at Q 1616, q 192, k 80; 1.01 at Q 1138, q 128, k 32; 1.02 at
  Q 256, q 32, k 16. One draw differs from the mean by 0.14, one score by 0.35,
  so that the output variance is 1.15 to 1.3 times the 1 / (2 L) aimed at.
  """
  config = config.for_width(model_dim)
  key_dim = _key_width(config)
  mean, core = 1.0, 1.0
  if config.grid == 'tucker' and config.init in ('paper', 'matched'):
    sizes = config.num_logical_keys, config.num_selected
    # Where all keys are kept their mean is 0; any scale does that cores undo.
    mean = max(expected_top_mean(*sizes), 0.1)
    # A single key is as often above 0 as below, and so is its only cell.
    cell = max(expected_cell_mean(*sizes), 0.1)
    core = 2 * mean / (config.tucker_rank * cell)
  reads = config.num_selected * config.num_heads
  scales = InitialScales(
    query=model_dim**-0.5,
    query_scale=mean**-0.5,
    keys=key_dim**-0.5,
    key_scale=key_dim**-0.5,
    cores=core,
    values=(config.num_pools / (2 * reads * num_layers)) ** 0.5,
    output=(config.num_pools * config.value_dim) ** -0.5,
    pre_values=max(config.pre_value_dim, 1) ** -0.5,
    pre_value_map=model_dim**-0.5,
  )
  if config.init == 'release':
    power = -0.4 if config.pre_value_dim else -0.33
    return dataclasses.replace(
      scales,
      query=config.key_dim**-0.5,
      query_scale=config.key_dim**power,
      key_scale=key_dim**power,
      values=0.02,
      pre_values=0.02,
    )
  if config.init == 'matched':
    linear = (2 / (5 * model_dim)) ** 0.5
    values = matched_value_scale(
      config, model_dim, _MLP_VARIANCE / (2 * num_layers), _SCORE_SPREAD
    )
    return dataclasses.replace(
      scales,
      values=values,
      pre_values=values,
      output=linear,
      pre_value_map=linear,
    )
  if config.init == 'product_keys':
    # A query of unit variance then gives scores of variance 1 / 3.
    return dataclasses.replace(
      scales,
      query_scale=1.0,
      key_scale=key_dim**-0.5,
      cores=1.0,
      values=config.value_dim**-0.5,
    )
  return scales


def _shuffled(
  key: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike = float
) -> jax.Array:
  """All addresses in a random order."""
  return jax.random.permutation(key, shape[0]).astype(dtype)


# E[(silu(a) b)^2] of independent normal a and b: times 1 / (2 L) what the MLP
# of `layers` writes for an input of unit variance ('gelu' writes 1.2 times it).
_MLP_VARIANCE = 0.3558

# Standard deviation of kept scores of mean 1, as measured above.
_SCORE_SPREAD = 0.35


def matched_value_scale(
  config: MemoryConfig,
  model_dim: int,
  output_variance: float,
  score_spread: float,
) -> float:
  """Standard deviation of values and pre-values, UltraMemV2's Eq. 26.

  Both maps have variance 2 / (5 D), and the layer then writes
  0.16 (1 + s^2) sigma^4 U k P W / D (Eq. 22 and 25), s being the spread of kept
  scores of mean 1. The paper's own MLP writes 0.064 F / D / (2 L). (The text
  of Eq. 26 has sigma^2 for sigma^4.)

  Args:
    config: of the layer.
    model_dim: width D.
    output_variance: what to write for an input of unit variance.
    score_spread: s.
  """
  reads = config.num_selected * config.num_heads
  gain = 0.16 * (1 + score_spread**2) * reads / model_dim
  gain *= config.pre_value_dim * config.value_dim
  return (output_variance / gain) ** 0.25


def parameters(
  config: MemoryConfig,
  model_dim: int,
  num_layers: int,
  scheme: str | None = 'columns',
) -> dict[str, tuple[Callable, jax.P | None, tuple[int, ...]]]:
  """Initializer, sharding and shape of every parameter.

  Args:
    config: of the layer.
    model_dim: width D.
    num_layers: blocks L of the model.
    scheme: of the tables: 'columns', 'rows' or 'grid'; None leaves them out.

  Raises:
    UserError: a width that must be the model's is not.
  """
  config = config.for_width(model_dim)
  scales = initial_scales(config, model_dim, num_layers)
  normal, constant = nn.initializers.normal, nn.initializers.constant
  param = mesh.param
  q, r, P = config.key_dim, config.num_ranks, config.num_heads
  E, W, U = config.num_pools, config.value_dim, config.pre_value_dim
  w, Q = _key_width(config), config.num_logical_keys
  query = {'shared': (2, q), 'per_head': (2, P, q), 'per_rank': (2, r, q)}
  query = query[config.query]
  spec = param('D' + '.' * len(query))
  declared = {'query': (normal(scales.query), spec, (model_dim, *query))}
  if config.query_bias:
    spec = param('.' * len(query))
    declared['query_bias'] = (constant(0.0), spec, query)
  if config.query_norm != 'none':
    scale = constant(scales.query_scale)
    declared['query_scale'] = (scale, param('.'), (q,))
  shape = (1 if config.share_keys else P, 2, Q, w, r)
  keys = normal(scales.keys)
  if config.init == 'product_keys':
    keys = _symmetric_uniform(w**-0.5)
  declared['keys'] = (keys, param('.....'), shape)
  if config.key_norm != 'none':
    declared['key_scale'] = (constant(scales.key_scale), param('.'), (w,))
  if config.grid == 'tucker':
    if config.cores_per_pairing:
      r *= math.isqrt(config.expansion)
    cores = nn.initializers.uniform(scales.cores)
    declared['cores'] = (cores, param('....'), (config.num_cores, P, r, r))
  if config.stored_addresses:
    declared['addresses'] = (_shuffled, param('.'), (Q**2,))
  if scheme is not None:
    declared |= table_parameters(config, model_dim, num_layers, scheme)
  if U and config.pre_value_map:
    pre_value_map = normal(scales.pre_value_map)
    declared['pre_value_map'] = (pre_value_map, param('DW'), (model_dim, U))
  if config.gate:
    gate = normal(model_dim**-0.5)
    declared['gate'] = (gate, param('D.W'), (model_dim, E, W))
  if config.output_map:
    output = normal(scales.output)
    declared['output'] = (output, param('.WD'), (E, W, model_dim))
  taps = config.query_conv_taps
  if taps > 0:
    conv = (normal(taps**-0.5), param('.D'), (taps, model_dim))
    declared['query_conv'] = conv
  return declared


def table_parameters(
  config: MemoryConfig, model_dim: int, num_layers: int, scheme: str
) -> dict[str, tuple[Callable, jax.P | None, tuple[int, ...]]]:
  """`parameters`, of the value table and of that of pre-values."""
  config = config.for_width(model_dim)
  scales = initial_scales(config, model_dim, num_layers)

  def table(scale: float, width: int):
    init = nn.initializers.normal(scale, config.table.dtype)
    if not scale:
      init = nn.initializers.constant(0.0, config.table.dtype)
    shape = mesh.part('MW', (config.table_rows, width))
    return init, mesh.table(scheme), shape

  begins_with_zeros = config.table.init == 'zeros'
  values = 0.0 if begins_with_zeros else scales.values
  tables = {'value_table': table(values, config.value_dim)}
  if config.pre_value_dim:
    pre_values = table(scales.pre_values, config.pre_value_dim)
    tables['pre_value_table'] = pre_values
  return tables


def _key_width(config: MemoryConfig) -> int:
  """Width w of a key of one rank."""
  ranks = config.num_ranks if config.split_key_dim else 1
  return config.key_dim // ranks


def _symmetric_uniform(bound: float) -> Callable:
  def init(key, shape, dtype=np.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init
