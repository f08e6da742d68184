# SPDX-License-Identifier: Apache-2.0
"""The protocol of optimizers here: optax's init and update, and finalize.

Some optimizers leave work for later: `row_adam` brings a row up to date when it
returns. `finalize` does what is left, so that whoever validates or exports asks
any optimizer for it and knows nothing of how it works.
"""

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import optax


def unchanged(
  params: optax.Params, state: optax.OptState
) -> tuple[optax.Params, optax.OptState]:
  """The `finalize` of optimizers that leave nothing for later."""
  return params, state


class Optimizer(optax.GradientTransformationExtraArgs):
  """An optax transformation that also has `finalize`.

  Attributes:
    finalize: from parameters and state to those in which all steps so far are
      done. Training goes on from either pair, the given or the returned, to
      the same parameters but for rounding.
  """

  finalize: Callable

  def __new__(
    cls, init: Callable, update: Callable, finalize: Callable = unchanged
  ) -> 'Optimizer':
    self = super().__new__(cls, init, update)
    self.finalize = finalize
    return self

  @property
  def is_final(self) -> bool:
    """Whether nothing is ever left for `finalize`."""
    return self.finalize is unchanged


def as_optimizer(inner: optax.GradientTransformation) -> Optimizer:
  """Any optax transformation with the whole protocol."""
  if isinstance(inner, Optimizer):
    return inner
  return Optimizer(*optax.with_extra_args_support(inner))


def partition(
  transforms: Mapping[Hashable, optax.GradientTransformation],
  labels: Callable[[optax.Params], Any] | Any,
) -> Optimizer:
  """`optax.partition` that finalizes each group as its transformation does.

  Args:
    transforms: by label.
    labels: of all parameters, a tree; or a function that makes it of them, or
      of what has their structure.
  """
  inner = optax.partition(transforms, labels)
  finalizing = {
    label: transform.finalize
    for label, transform in transforms.items()
    if not as_optimizer(transform).is_final
  }

  def finalize(params, state):
    for label, finalize_group in finalizing.items():
      of = labels(params) if callable(labels) else labels
      group, rest = split(params, of, label)
      group, group_state = finalize_group(group, state_of(state, label))
      params = merged(group, rest)
      state = with_state(state, label, group_state)
    return params, state

  return Optimizer(inner.init, inner.update, finalize)


def state_of(state: optax.PartitionState, label: Hashable) -> optax.OptState:
  """The state of one group's transformation."""
  return state.inner_states[label].inner_state


def with_state(
  state: optax.PartitionState, label: Hashable, group_state: optax.OptState
) -> optax.PartitionState:
  """`state` with another state of one group's transformation."""
  group = state.inner_states[label]._replace(inner_state=group_state)
  return optax.PartitionState({**state.inner_states, label: group})


def split(
  params: optax.Params, labels: Any, label: Hashable
) -> tuple[optax.Params, optax.Params]:
  """The leaves of one label, and the others.

  Both trees are like `params`, with `optax.MaskedNode` for what the other has.
  """

  def part(has_label: bool) -> optax.Params:
    return jax.tree.map(
      lambda of, x: x if (of == label) == has_label else optax.MaskedNode(),
      labels,
      params,
    )

  return part(True), part(False)


def merged(first: optax.Params, second: optax.Params) -> optax.Params:
  """What `split` has split."""
  return jax.tree.map(
    lambda a, b: b if _is_masked(a) else a, first, second, is_leaf=_is_masked
  )


def _is_masked(x: Any) -> bool:
  return isinstance(x, optax.MaskedNode)
