# SPDX-License-Identifier: Apache-2.0
"""The models of the decode bench: same backbone, FLOPs and, if sparse, size.

Two families. 'own' is made of the options, at a size for a CPU. '680m' is the
680M family of the UltraMem paper (arXiv:2411.12364, Table 1): UltraMem as its
recipe has it, and beside it a dense model whose MLPs are wider by what the
memory layers compute. It has 16 heads of 96 instead of 12 of 128: attention of
the same size that splits into groups of 4 and of 8.
"""

import argparse
import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.analysis import budget, cost
from jaxsparse.config import MemoryConfig, ModelConfig, TableConfig
from jaxsparse.config.errors import UserError, require, require_choice
from jaxsparse.config.model import MoEConfig
from jaxsparse.experiments.compare.suite import Architecture
from jaxsparse.nn.transformer import Transformer
from jaxsparse.run import recipe_files

NAMES = ('dense', 'moe', 'pkm', 'ultramem', 'ultramem_v2')
FAMILIES = ('own', '680m')


def make_models(
  options: argparse.Namespace, kv_group: int
) -> dict[str, ModelConfig]:
  """The models by name, with `kv_group` query heads to one of keys and values.

  The options are those of the bench, see `decode.OPTIONS`.

  Raises:
    UserError: there is no such family or model, or no sizes meet the budget.
  """
  names = options.models.split(',')
  for name in names:
    require(
      name in NAMES,
      f'models must be some of {", ".join(NAMES)}; got {name!r}.',
    )
  require_choice(options, 'family', FAMILIES)
  family = _own if options.family == 'own' else _published
  base, architectures, total = family(options, kv_group)
  return {
    name: budget.fit(
      base,
      name,
      architectures[name],
      total_parameters=total,
      seq_len=options.context,
      width_multiple=options.width_multiple,
    )
    for name in names
  }


def _own(options, kv_group):
  width, layers = options.model_dim, options.layers
  require(layers >= 3, f'layers must be at least 3, got {layers}.')
  base = ModelConfig(
    num_layers=layers,
    model_dim=width,
    num_heads=options.heads,
    num_kv_heads=_kv_heads(options.heads, kv_group),
    head_dim=width // options.heads,
    mlp_dim=options.mlp_dim,
    vocab_size=options.vocab,
    dtype=options.dtype,
  )
  common = dict(
    key_dim=width // 4,
    num_selected=options.selected,
    table=_table(options),
  )
  middle = layers // 2
  architectures = _architectures(
    experts=MoEConfig(num_experts_per_token=options.used),
    pkm=MemoryConfig.pkm(
      value_dim=width, num_heads=2, placements=((middle, middle),), **common
    ),
    ultramem=MemoryConfig.ultramem(
      value_dim=width // 2,
      num_heads=2,
      split_key_dim=True,
      query_conv_taps=5,
      placements=tuple((i, i + 1) for i in range(1, layers - 1, 2)),
      **common,
    ),
    ultramem_v2=MemoryConfig.ultramem_v2(
      value_dim=width // 4,
      pre_value_dim=width // 4,
      # Each layer sees half of the rows.
      shared_rows=2 * 128**2,
      placements=tuple((i, i) for i in range(layers)),
      **common,
    ),
  )
  total = options.growth * cost.count_parameters(base).published
  return base, architectures, total


def _published(options, kv_group):
  recipe = recipe_files.shipped('ultramem:680m').model
  recipe = dataclasses.replace(
    recipe,
    num_heads=16,
    head_dim=96,
    num_kv_heads=_kv_heads(16, kv_group),
    use_remat=False,
    dtype=options.dtype,
    memory=dataclasses.replace(recipe.memory, table=_table(options)),
  )
  base = dataclasses.replace(recipe, memory=None)
  base = _wider(base, cost.forward_flops(recipe, options.context), options)
  width, layers, memory = recipe.model_dim, recipe.num_layers, recipe.memory
  common = dict(table=_table(options))
  middle = layers // 2 - 1
  architectures = _architectures(
    experts=MoEConfig(num_experts=33, num_experts_per_token=2),
    # As in configs/pkm.py:151m: one layer beside the MLP of a middle block.
    pkm=MemoryConfig.pkm(
      key_dim=memory.key_dim,
      num_heads=memory.num_heads,
      num_selected=memory.num_selected,
      value_dim=width,
      query_bias=False,
      placements=((middle, middle),),
      **common,
    ),
    ultramem=memory,
    # As in configs/ultramem_v2.py:227m, by the model's width.
    ultramem_v2=MemoryConfig.ultramem_v2(
      key_dim=width // 4,
      num_selected=32,
      value_dim=width // 4,
      pre_value_dim=width // 4,
      expansion=1,
      shared_rows=2 * 128**2,
      placements=tuple((i, i) for i in range(layers)),
      **common,
    ),
  )
  return base, architectures, cost.count_parameters(recipe).published


def _table(options):
  return TableConfig(dtype=options.table_dtype or options.dtype)


def _architectures(*, experts, **memories):
  architectures = {n: Architecture(memory=m) for n, m in memories.items()}
  return architectures | dict(
    dense=Architecture(), moe=Architecture(moe=experts)
  )


def _kv_heads(num_heads: int, kv_group: int) -> int:
  if kv_group < 1 or num_heads % kv_group:
    raise UserError(
      f'kv_groups must divide the {num_heads} heads, got {kv_group}.'
    )
  return num_heads // kv_group


def _wider(base, flops, options):
  """The dense model with the MLPs that come nearest to `flops` per token."""

  def of_width(width):
    return dataclasses.replace(base, mlp_dim=width)

  one, two = (
    cost.forward_flops(of_width(w), options.context)
    for w in (base.mlp_dim, base.mlp_dim + 1)
  )
  width = base.mlp_dim + (flops - one) / (two - one)
  multiple = options.width_multiple
  return of_width(multiple * round(width / multiple))


def draw_params(config: ModelConfig) -> dict:
  """Parameters in the type of the activations, or of tables: as one serves.

  Cheap to make and large enough to differ: a hash of each entry's number,
  spread evenly. Token embeddings have unit variance and all other matrices
  1 / D, so that a block's input is mostly its token's: different tokens choose
  different experts and rows, equal ones mostly the same.
  """
  tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  shapes = jax.eval_shape(
    Transformer(config).init, jax.random.key(0), tokens, tokens, tokens
  )['params']
  memory = config.memory

  def draw(path, x):
    name = jax.tree_util.keystr(path)
    is_table = 'value_table' in name
    dtype = jnp.dtype(memory.table.dtype if is_table else config.dtype)
    if 'bias' in name:
      return jnp.zeros(x.shape, dtype)
    if x.ndim < 2:
      return jnp.ones(x.shape, jnp.float32)
    scale = 1.0 if 'embed' in name else config.model_dim**-0.5
    return noise(x.shape, dtype, zlib.crc32(name.encode()) % 2**31, scale)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@jax.jit(static_argnums=(0, 1))
def noise(
  shape: tuple[int, ...],
  dtype: jax.typing.DTypeLike,
  seed: jax.typing.ArrayLike,
  scale: jax.typing.ArrayLike,
) -> jax.Array:
  """Evenly spread values of standard deviation `scale` and mean 0.

  Each is the finalizer of MurmurHash3 on its position, in one pass over memory.
  """
  x = jnp.full(shape, jnp.uint32(seed))
  stride = 1
  for axis in reversed(range(len(shape))):
    along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    x += along * np.uint32(stride % 2**32)
    stride *= shape[axis]
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    x = (x ^ (x >> shift)) * np.uint32(factor)
  uniform = x.astype(jnp.float32) / 2.0**31 - 1
  return (uniform * scale * 3**0.5).astype(dtype)
