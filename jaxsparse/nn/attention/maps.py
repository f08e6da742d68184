# SPDX-License-Identifier: Apache-2.0
"""What attention looks at, for whoever asks for it.

Attention is linear in its values, whatever chose and composed its weights: read
with unit vectors for values it gives the weights themselves. Layers do that
only if the collection `MAPS` is mutable.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

MAPS = 'attention_maps'
# Zeros that are added to what each layer reads, for its gradient.
ATTENTION_PROBES = 'attention_probes'


def weights_of(
  read: Callable[[jax.Array], jax.Array], value: Float[Array, 'B S K H']
) -> Float[Array, 'B T N S']:
  """The weights by which `read` sums values."""
  batch, length, heads, width = value.shape
  num_parts = -(-length // width)
  units = jnp.eye(length, num_parts * width, dtype=value.dtype)
  units = jnp.moveaxis(units.reshape(length, num_parts, width), 1, 0)

  def one_part(unit):
    shape = (batch, length, heads, width)
    return read(jnp.broadcast_to(unit[None, :, None], shape))

  weights = jnp.moveaxis(jax.lax.map(one_part, units), 0, 3)
  return weights.reshape(*weights.shape[:3], -1)[..., :length]


def show(
  module: nn.Module, value: jax.Array, **reads: Callable[[jax.Array], jax.Array]
) -> None:
  """Leaves the weights of each way to read, and the values."""
  if is_asked_for(module):
    module.sow(MAPS, 'value', value)
    for name, read in reads.items():
      module.sow(MAPS, name, weights_of(read, value))


def show_arrays(module: nn.Module, **arrays: jax.Array) -> None:
  if is_asked_for(module):
    for name, array in arrays.items():
      module.sow(MAPS, name, array)


def is_asked_for(module: nn.Module) -> bool:
  """Initialization makes every collection mutable, and asks for nothing."""
  return module.is_mutable_collection(MAPS) and not module.is_initializing()


def probed(module: nn.Module, read: jax.Array) -> jax.Array:
  """What was read, plus the layer's probe if there is one."""
  if module.has_variable(ATTENTION_PROBES, 'read'):
    return read + module.get_variable(ATTENTION_PROBES, 'read')
  return read
