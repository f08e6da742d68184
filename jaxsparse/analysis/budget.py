# SPDX-License-Identifier: Apache-2.0
"""Sizes of an architecture, derived from a budget.

All have the base's forward FLOPs per token, by the width of their MLPs or
experts; sparse ones have a given total of parameters, by their number of keys
or experts. Keys cost FLOPs and widths hold parameters, so the one is solved
inside the other: for a number of keys, FLOPs are a straight line over the
width; the total grows with the number of keys.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from jaxsparse.analysis import cost
from jaxsparse.config import MemoryConfig, ModelConfig, MoEConfig
from jaxsparse.config.errors import UserError

# How far from the budget a derived size may be.
FLOPS_TOLERANCE = 0.01
TOTAL_TOLERANCE = 0.03

# No model of ours has more sub-keys per axis, or experts.
_MOST = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
  """What stands in, or beside, the MLPs of the base model.

  Its number of keys or experts, and the width of its MLPs or experts, are only
  a start: `fit` derives them from the budget. Rows that placements share
  keep their ratio to num_keys ** 2.
  """

  memory: MemoryConfig | None = None
  moe: MoEConfig | None = None
  # Fields of the `ModelConfig` that differ from the base's, such as those of
  # its attention. Alone they are paid for by narrower MLPs; with mlp_dim among
  # them, all sizes are as they say.
  model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # Fields of the `OptimizerConfig` that differ from the base's.
  optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  # With people, unless 0: the learning rate is at most this over their number.
  lr_per_person: float = 0.0
  # In a walk: what the step to this architecture changed in a publication, in
  # nats of training and validation loss.
  published: tuple[float, float] | None = None

  @property
  def is_sparse(self) -> bool:
    """Whether it has the total of parameters of sparse architectures."""
    return bool(self.memory or self.moe)


def fit(
  base: ModelConfig,
  name: str,
  architecture: Architecture,
  *,
  total_parameters: int,
  seq_len: int,
  width_multiple: int = 1,
) -> ModelConfig:
  """The base with the architecture in it, at the base's FLOPs.

  Args:
    base: the dense model; its vocabulary is set.
    name: of the architecture, for errors.
    architecture: the base itself is returned for a dense one, and one that
      names its own mlp_dim is as it says, whatever its FLOPs.
    total_parameters: without embeddings and gains, of a sparse architecture.
    seq_len: tokens over which attention counts.
    width_multiple: of what the width is to be a multiple.

  Raises:
    UserError: no width or no number of keys or experts meets the budget.
  """
  if not (architecture.is_sparse or architecture.model):
    return base
  budget = cost.forward_flops(base, seq_len)
  template = dataclasses.replace(
    base,
    **dict(architecture.model),
    memory=architecture.memory,
    moe=architecture.moe,
  )
  if 'mlp_dim' in architecture.model:
    return template
  if not architecture.is_sparse:
    model = _at_budget(template, budget, seq_len, width_multiple)
    return _within_budget(name, model, budget, seq_len, width_multiple)

  def sized(count: int) -> ModelConfig | None:
    model = _with_count(template, count)
    return _at_budget(model, budget, seq_len, width_multiple)

  count = _nearest(sized, _least_count(template), total_parameters)
  model = None if count is None else sized(count)
  model = _within_budget(name, model, budget, seq_len, width_multiple)
  total = cost.count_parameters(model).published
  if abs(total / total_parameters - 1) > TOTAL_TOLERANCE:
    what = 'experts' if architecture.moe else 'keys'
    raise UserError(
      f'{name}: no number of {what} comes within {TOTAL_TOLERANCE:.0%} of '
      f'{total_parameters:,} parameters at {budget:,} FLOPs per token, the '
      f'nearest has {total:,}: change total_parameters, or its other sizes.'
    )
  return model


def _within_budget(name, model, budget, seq_len, width_multiple):
  if model is None:
    raise UserError(
      f'{name}: nothing is left of {budget:,} FLOPs per token for its MLPs or '
      'experts: make its keys or heads smaller, or the base model larger.'
    )
  flops = cost.forward_flops(model, seq_len)
  if abs(flops / budget - 1) > FLOPS_TOLERANCE:
    raise UserError(
      f'{name}: no width that is a multiple of {width_multiple} comes within '
      f'{FLOPS_TOLERANCE:.0%} of {budget:,} FLOPs per token, the nearest has '
      f'{flops:,}: lower width_multiple.'
    )
  return model


def describe(model: ModelConfig) -> str:
  """The derived sizes, in words."""
  if model.moe:
    return f'{model.moe.num_experts} experts of width {model.moe.expert_dim}'
  memory = model.sized_memory
  if memory:
    rows = memory.num_tables * memory.table_rows
    return (
      f'{memory.num_keys} keys an axis, {rows:,} rows of {memory.value_dim}, '
      f'MLP {model.mlp_dim}'
    )
  return f'MLP {model.mlp_dim}'


def _with_count(template: ModelConfig, count: int) -> ModelConfig:
  """The template with `count` experts, or sub-keys on each axis."""
  if template.moe:
    moe = dataclasses.replace(template.moe, num_experts=count)
    return dataclasses.replace(template, moe=moe)
  memory = template.memory
  ratio = memory.shared_rows / memory.num_slots
  memory = dataclasses.replace(
    memory, num_keys=count, shared_rows=round(ratio * count**2)
  )
  return dataclasses.replace(template, memory=memory)


def _with_width(model: ModelConfig, width: int) -> ModelConfig:
  if model.moe:
    moe = dataclasses.replace(model.moe, expert_dim=width)
    return dataclasses.replace(model, moe=moe)
  return dataclasses.replace(model, mlp_dim=width)


def _least_count(template: ModelConfig) -> int:
  if template.moe:
    return template.moe.num_experts_per_token
  memory = template.memory
  return -(-memory.num_selected // math.isqrt(memory.expansion))


def _at_budget(
  model: ModelConfig, budget: int, seq_len: int, multiple: int
) -> ModelConfig | None:
  """The model with the width that meets the budget; None if there is none."""

  def flops(width: int) -> int:
    return cost.forward_flops(_with_width(model, width), seq_len)

  slope = flops(2) - flops(1)
  if slope <= 0:
    return None
  width = (budget - flops(1)) / slope + 1
  width = multiple * round(width / multiple)
  return _with_width(model, width) if width > 0 else None


def _nearest(
  sized: Callable[[int], ModelConfig | None], least: int, total: int
) -> int | None:
  """The count whose total is nearest; None if the least one has no width."""

  def excess(count: int) -> float:
    """Above 0 where there are too many parameters, or no width is left."""
    model = sized(count)
    if model is None:
      return math.inf
    return float(cost.count_parameters(model).published - total)

  if sized(least) is None:
    return None
  low, high = least, least + 1
  while excess(high) < 0 and high < _MOST:
    low, high = high, 2 * high
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (middle, high) if excess(middle) < 0 else (low, middle)
  return min(low, high, key=lambda count: abs(excess(count)))
