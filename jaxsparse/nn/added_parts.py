# SPDX-License-Identifier: Apache-2.0
"""More parts for a trained model, which begins as the same function.

Memory layers start with an output of zero; experts as copies of the MLP (sparse
upcycling, Komatsuzaki et al., arXiv:2212.05055), whose weights add up to one;
composed heads with the identity. Training goes on from there.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import require
from jaxsparse.nn.transformer import init_params

# Drawn in no part of training, whose seeds are folded with small numbers.
_SEED = 2**31 - 1


def require_silent(old: ModelConfig, new: ModelConfig) -> None:
  """Checks that the parts which the trained model lacks can begin silent.

  Raises:
    UserError: another function would begin.
  """
  if new.memory and old.memory is None:
    require(
      not new.memory.replaces_mlp,
      'model.memory.replaces_mlp would throw trained MLPs away: leave it off.',
    )
  if new.moe and old.moe is None:
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


def drawing_key(seed: int) -> jax.Array:
  """The key by which parts are drawn that a trained model lacks."""
  return jax.random.fold_in(jax.random.key(seed), _SEED)


def extend(
  old: ModelConfig,
  new: ModelConfig,
  params: Mapping,
  seed: int = 0,
  is_left_out: Callable[[str], bool] = lambda name: False,
) -> dict[str, Any]:
  """Parameters of the extended model, on the mesh in use.

  Args:
    old: the trained model.
    new: what `require_silent` has passed.
    params: of the trained model; its arrays are used again.
    seed: of what is drawn.
    is_left_out: whether a leaf of that path lies elsewhere.

  Returns:
    The tree that `Transformer(new)` has. Leaves of other parts than memory
    layers, experts and composed heads begin as they do in a new model.
  """
  given = {
    name: _copies(name, x, new.moe.num_experts)
    if new.moe and name != copied_to(old, new, name)
    else x
    for name, x in flatten_dict(params, sep='/').items()
  }
  given = {copied_to(old, new, name): x for name, x in given.items()}

  @jax.jit
  def added() -> dict[str, jax.Array]:
    drawn = init_params(new, drawing_key(seed))
    # What is not returned is not drawn either.
    return {
      name: _silent(name, x, new)
      for name, x in flatten_dict(drawn, sep='/').items()
      if name not in given and not is_left_out(name)
    }

  more = added() if jax.eval_shape(added) else {}
  return unflatten_dict(given | more, sep='/')


def copied_to(old: ModelConfig, new: ModelConfig, name: str) -> str:
  """The path in the extended model that begins as this leaf of the old one."""
  is_copied = new.moe is not None and old.moe is None
  return name.replace('/mlp/', '/moe/') if is_copied else name


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
