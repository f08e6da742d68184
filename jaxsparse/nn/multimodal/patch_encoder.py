# SPDX-License-Identifier: Apache-2.0
"""A picture's patches as states: a vision transformer of our own blocks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxsparse import mesh
from jaxsparse.config import VisionConfig
from jaxsparse.config.errors import require
from jaxsparse.nn.door import portable
from jaxsparse.nn.layers import NORMS, Metrics, bias, weight
from jaxsparse.nn.leading import Leading, require_integers
from jaxsparse.nn.multimodal.masks import only_there
from jaxsparse.nn.stream import check_split, run_blocks
from jaxsparse.ops.patches import places, sines_2d
from jaxsparse.ops.token_product import token_product


class PatchEncoder(nn.Module):
  """ViT (arXiv:2010.11929) on the blocks of a language model, not causal.

  Pictures of several sizes may be packed into a row by their segment ids, as
  documents are (NaViT, arXiv:2307.06304). Leaves: `patches` [3 P^2, D] and
  `patches_bias` [D]; `positions` [Li, D] for 'learned', `rows` and `columns`
  [S / P, D] for 'factorised'; `block_00` and so on, `final_norm`.

  Attributes:
    config: of the picture and its stream.
    axes: names of the mesh axes of a program of your own, see `mesh.Axes`.
  """

  config: VisionConfig
  axes: mesh.Axes = mesh.DEFAULT_AXES

  @nn.compact
  @portable()
  def __call__(
    self,
    patches: Num[Array, '*S P'],
    at: Int[Array, '*S 2'] | None = None,
    segment_ids: Int[Array, '*S'] | None = None,
    deterministic: bool = True,
  ) -> tuple[Float[Array, '*S D'], Metrics]:
    """States of patches, each of which sees all of its picture.

    Args:
      patches: numbers of each, in [-1, 1], as `ops.patches.patchify` orders
        them; the last leading dimension is that of a picture's patches.
      at: row and column of each patch, by default those of a picture of
        image_size. Learned positions beyond it are NaN.
      segment_ids: picture of each patch; 0 for padding. By default all patches
        are of one. What stands in padding changes nothing.
      deterministic: False for dropout, which needs the rng 'dropout'.

    Returns:
      The states, normalised, and the metrics of the blocks.

    Raises:
      UserError: patches are of another size, or without `at` not as many as a
        picture has; places are no integers; a size does not fit the mesh.
    """
    lead, config = Leading.of(patches, 'patches'), self.config
    require(
      patches.shape[-1] == config.patch_dim,
      f'patches must have 3 patch_size^2 = {config.patch_dim} numbers each, '
      f'got {patches.shape[-1]}.',
    )
    if at is None:
      require(
        lead.shape[-1:] == (config.num_patches,),
        f'pictures must have image_size = {config.image_size} pixels a side, '
        f'{config.num_patches} patches, or `at` say where each one is; got '
        f'{list(lead.shape)}.',
      )
      at = jnp.broadcast_to(places(config.grid, config.grid), (*lead.shape, 2))
    require_integers(at, 'at')
    require(
      at.shape == (*lead.shape, 2),
      f'at must have the dimensions {[*lead.shape, 2]}, a row and a column of '
      f'each patch, got {list(at.shape)}.',
    )
    _, segment_ids = lead.places(segment_ids, segment_ids)
    x, metrics = self._run(
      lead.flat(patches, 'patches'),
      lead.flat(at, 'at'),
      lead.flat(segment_ids, 'segment_ids'),
      deterministic,
    )
    return lead.restored(x), lead.metrics(metrics)

  def _run(self, patches, at, segment_ids, deterministic):
    """`__call__` of pictures [B, L]."""
    config, stream = self.config, self.config.stream
    check_split(stream, len(patches))
    width = stream.model_dim
    # Whatever stands in padding, NaN and places beyond the table among it.
    patches, at = (only_there(x, segment_ids) for x in (patches, at))
    matrix = self._table('patches', config.patch_dim, 1 / config.patch_dim)
    x = patches.astype(stream.dtype)
    x = token_product('p,pd->d', x, matrix, out_sharding=mesh.act('BTD'))
    x += bias(self, 'patches_bias', 'D', (width,), 3).astype(x.dtype)
    # Where nothing is rotated all are at 0.
    positions = jnp.zeros_like(segment_ids)
    if config.positions == 'rope':
      positions = at
    elif config.positions == 'sincos':
      x += sines_2d(at, width).astype(x.dtype)
    elif config.positions == 'learned':
      table = self._table('positions', config.num_patches, 1 / width)
      is_inside = (at < config.grid).all(-1)
      index = at[..., 0] * config.grid + at[..., 1]
      # Of a place that there is not, one that the table has not.
      x += _rows(table, jnp.where(is_inside, index, config.num_patches))
    else:
      for i, name in enumerate(('rows', 'columns')):
        x += _rows(self._table(name, config.grid, 0.5 / width), at[..., i])
    x, _, metrics = run_blocks(
      stream, x, positions, segment_ids, deterministic=deterministic
    )
    norm = NORMS[stream.norm]
    norm = norm(stream.norm_epsilon, dtype=stream.dtype, name='final_norm')
    return norm(x), metrics

  def _table(self, name: str, num_rows: int, variance: float) -> jax.Array:
    stream = self.config.stream
    shape = num_rows, stream.model_dim
    return weight(self, name, '.D', shape, variance, stream.dtype)


def _rows(table: Float[Array, 'N D'], index: Int[Array, 'B T']):
  return table.at[index].get(
    mode='fill',
    fill_value=jnp.nan,
    wrap_negative_indices=False,
    out_sharding=mesh.act('BTD'),
  )
