# SPDX-License-Identifier: Apache-2.0
"""More parts for a trained model, which begins as the same function.

Memory layers start with an output of zero; experts as copies of the MLP (sparse
upcycling, Komatsuzaki et al., arXiv:2212.05055), whose weights add up to one;
composed heads with the identity. Training goes on from there.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsparse import mesh
from jaxsparse.config import DCMHAConfig, MemoryConfig, ModelConfig, MoEConfig
from jaxsparse.config.errors import require
from jaxsparse.interop import our_leaves
from jaxsparse.nn.transformer import init_params

MEMORIES = ('ultramem', 'ultramem_v2', 'memory_plus', 'pkm', 'peer')
PRESETS = (*MEMORIES, 'moe', 'dcmha')

# The field of the model that a preset fills.
_FIELD = dict(moe='moe', dcmha='dcmha') | dict.fromkeys(MEMORIES, 'memory')

# Drawn in no part of training, whose seeds are folded with small numbers.
_SEED = 2**31 - 1


def field_of(preset: str) -> str:
  return _FIELD[preset]


def with_part(model: ModelConfig, preset: str) -> ModelConfig:
  """The model with a preset's part, its sizes fitted to it.

  Args:
    model: the trained one.
    preset: one of `PRESETS`.

  Raises:
    UserError: the model has such a part already, or can't have it.
  """
  field = _FIELD[preset]
  require(
    getattr(model, field) is None,
    f'the model has {field} already, so --preset={preset} has nothing to add: '
    'name another workdir or preset.',
  )
  part: Any
  if preset == 'moe':
    part = MoEConfig(expert_dim=model.mlp_dim)
  elif preset == 'dcmha':
    part = DCMHAConfig()
  else:
    part = _memory(model.num_layers, preset)
  return dataclasses.replace(model, **{field: part})


def _memory(num_layers: int, preset: str) -> MemoryConfig:
  """A preset beside the MLPs, which stay."""
  make = getattr(MemoryConfig, preset)
  every = range(num_layers)
  if preset == 'ultramem_v2':
    num_slots = make().num_slots
    return make(
      placements=tuple((i, i) for i in every),
      # As many rows as if every fourth block had a table of its own.
      shared_rows=num_slots * -(-num_layers // 4),
      replaces_mlp=False,
    )
  # A quarter, half and three quarters of the way, or all there are.
  reads = sorted({num_layers * i // 4 for i in (1, 2, 3)})
  # Of UltraMem the lookup runs beside the blocks between.
  ahead = max(1, num_layers // 8) if preset == 'ultramem' else 0
  places = tuple((i, min(i + ahead, num_layers - 1)) for i in reads)
  return make(placements=places, replaces_mlp=False)


def require_same_function(old: ModelConfig, new: ModelConfig, field: str):
  """Checks that nothing but the part was changed, and that it can be silent.

  Raises:
    UserError: another function would begin.
  """
  without = dataclasses.replace(new, **{field: None})
  for one in dataclasses.fields(old):
    before, after = getattr(old, one.name), getattr(without, one.name)
    require(
      before == after,
      f'model.{one.name} = {after!r} is not that of the trained model, '
      f'{before!r}: only fields of model.{field} are free here.',
    )
  if field == 'memory':
    require(
      not (new.memory and new.memory.replaces_mlp),
      'model.memory.replaces_mlp would throw trained MLPs away: leave it off.',
    )
  if new.moe and field == 'moe':
    require(
      new.moe.expert_dim == old.mlp_dim,
      'model.moe.expert_dim must be the width of the MLPs that experts copy, '
      f'{old.mlp_dim}, got {new.moe.expert_dim}.',
    )
    require(
      new.moe.normalize_weights and not new.moe.num_shared,
      'model.moe.normalize_weights must be on and num_shared 0: copies of an '
      'MLP make the MLP only with weights that add up to one.',
    )


def extend(
  old: ModelConfig, new: ModelConfig, field: str, params: Mapping
) -> dict[str, Any]:
  """Parameters of the extended model, on the mesh in use.

  Args:
    old: the trained model.
    new: what `require_same_function` has passed.
    field: the part that is new.
    params: of the trained model; its arrays are used again.

  Returns:
    The tree that `Transformer(new)` has.
  """
  given = our_leaves.flat(params)

  @jax.jit
  def added() -> dict[str, jax.Array]:
    key = jax.random.fold_in(jax.random.key(0), _SEED)
    drawn = init_params(new, key)
    # What is not returned is not drawn either.
    return {
      name: _silent(name, x, new)
      for name, x in our_leaves.flat(drawn).items()
      if name not in given and not _is_expert(name)
    }

  if field == 'moe':
    assert new.moe is not None
    given = {
      name.replace('/mlp/', '/moe/'): _copies(name, x, new.moe.num_experts)
      if '/mlp/' in name
      else x
      for name, x in given.items()
    }
  return our_leaves.nested(given | added())


def _is_expert(name: str) -> bool:
  return '/moe/' in name and name.rpartition('/')[2] in ('gate', 'up', 'down')


def _silent(name: str, x: jax.Array, model: ModelConfig) -> jax.Array:
  """The initial value, or the zeros by which a part says nothing at first."""
  *_, layer, leaf = ('', *name.split('/'))
  if layer == 'memory' and model.memory:
    last = 'output' if model.memory.output_map else 'value_table'
    return jnp.zeros_like(x) if leaf == last else x
  if layer == 'dcmha':
    if leaf == 'low_rank':
      # Reading vectors stay, or neither of the two would get a gradient.
      rank = x.shape[-2] // 2
      return x.at[..., rank:, :].set(0)
    return x if leaf == 'hidden' else jnp.zeros_like(x)
  return x


def _copies(
  name: str, matrix: Float[Array, 'A B'], num_experts: int
) -> Float[Array, 'X A B']:
  """Equal experts, laid as experts are."""
  dims = 'FD' if name.endswith('/down') else 'DF'

  @jax.jit
  def copy(matrix):
    shape, spec = (num_experts, *matrix.shape), mesh.param(f'.{dims}')
    copies = jnp.broadcast_to(matrix, shape, out_sharding=spec)
    return mesh.reshard(copies, mesh.param(f'X{dims}'))

  return copy(matrix)
