# SPDX-License-Identifier: Apache-2.0
"""Muon: steps of a matrix whose singular values are all about one.

The momentum of each matrix is made nearly orthogonal by five Newton-Schulz
iterations (K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon),
those of `optax.contrib`. An orthogonal [m, n] has a root mean square of
1 / sqrt(max(m, n)); times 0.2 sqrt(max(m, n)) it is that of AdamW's steps, so
that learning rates and weight decays of AdamW serve Muon too (Moonlight,
arXiv:2502.16982).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from jaxsparse import mesh
from jaxsparse.training.optimizers.row_updates import in_float32

# Root mean square of AdamW's steps in units of the learning rate.
_ADAMW_SIZE = 0.2


def muon(
  learning_rate: optax.ScalarOrSchedule,
  momentum: float,
  weight_decay: float,
  dimensions: Callable[[optax.Params], Any],
) -> optax.GradientTransformationExtraArgs:
  """Muon with Nesterov's momentum and decoupled weight decay.

  State and iterations are in f32. On a mesh the momentum is split as its
  parameter is; for the iterations every device gathers the whole matrices,
  but of a batch of matrices that is split only its own.

  Args:
    learning_rate: AdamW's, constant or a schedule of the number of steps
      before.
    momentum: decay of the sum of gradients.
    weight_decay: as `optax.adamw` has it.
    dimensions: from parameters, or what has their structure, to the
      `MuonDimensionNumbers` of each; the other dimensions number matrices.
  """
  return in_float32(
    optax.chain(
      optax.trace(momentum, nesterov=True),
      _orthogonalize(dimensions),
      optax.add_decayed_weights(weight_decay),
      optax.scale_by_learning_rate(learning_rate),
    )
  )


def _orthogonalize(
  dimensions: Callable[[optax.Params], Any],
) -> optax.GradientTransformation:
  """Without momentum of its own: that of `scale_by_muon` is switched off."""
  iterations = optax.contrib.scale_by_muon(
    beta=0.0, nesterov=False, weight_dimension_numbers=dimensions
  )

  def update(updates, state, params=None):
    del params
    numbers = dimensions(updates)
    whole = jax.tree.map(_gathered, updates, numbers)
    whole, _ = iterations.update(whole, iterations.init(whole))
    return jax.tree.map(_like_adamw, whole, updates, numbers), state

  return optax.GradientTransformation(optax.init_empty_state, update)


def _gathered(x: jax.Array, numbers: MuonDimensionNumbers) -> jax.Array:
  """`x` with each of its matrices whole on a device."""
  spec = mesh.spec_of(x)
  if spec is None:
    return x
  inside = {*_tuple(numbers.reduction_axis), *_tuple(numbers.output_axis)}
  kept = (None if i in inside else axis for i, axis in enumerate(spec))
  return mesh.reshard(x, jax.P(*kept))


def _like_adamw(
  x: jax.Array, update: jax.Array, numbers: MuonDimensionNumbers
) -> jax.Array:
  """Orthogonal matrices as steps of AdamW's size, split as `update` is."""
  rows, columns = (
    math.prod(x.shape[i] for i in _tuple(axes))
    for axes in (numbers.reduction_axis, numbers.output_axis)
  )
  x = x * (_ADAMW_SIZE * math.sqrt(max(rows, columns)))
  return mesh.reshard(x, mesh.spec_of(update))


def _tuple(axes: int | Sequence[int]) -> tuple[int, ...]:
  return (axes,) if isinstance(axes, int) else tuple(axes)
