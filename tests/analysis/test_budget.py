# SPDX-License-Identifier: Apache-2.0
"""Sizes meet the budget, or a sentence says why they can't."""

import dataclasses
import itertools

import pytest
from lanes import few

from jaxsparse.analysis import budget, cost
from jaxsparse.config import MemoryConfig, ModelConfig, MoEConfig
from jaxsparse.config.errors import UserError
from jaxsparse.experiments.compare.suite import Architecture

BASE = ModelConfig(
  num_layers=4,
  model_dim=128,
  num_heads=4,
  num_kv_heads=4,
  head_dim=32,
  mlp_dim=352,
  vocab_size=257,
)
MEMORY = MemoryConfig(placements=((1, 2),))


def fit(architecture, total=2_000_000, base=BASE, **fields):
  arguments = dict(total_parameters=total, seq_len=128) | fields
  return budget.fit(base, 'it', architecture, **arguments)


def test_dense_is_the_base():
  assert fit(Architecture()) == BASE


@pytest.mark.parametrize(
  ('total', 'expansion'),
  few(
    [(1_200_000, 4), (2_000_000, 1), (9_000_000, 4)],
    itertools.product([1_200_000, 2_000_000, 9_000_000], [1, 4]),
  ),
)
def test_memory_meets_the_budget(total, expansion):
  memory = dataclasses.replace(MEMORY, expansion=expansion)
  model = fit(Architecture(memory=memory), total)
  flops = cost.forward_flops(model, 128)
  assert flops == pytest.approx(cost.forward_flops(BASE, 128), rel=0.01)
  parameters = cost.count_parameters(model).published
  assert parameters == pytest.approx(total, rel=0.03)
  changed = dataclasses.replace(
    model.memory, num_keys=memory.num_keys, shared_rows=0
  )
  assert changed == memory


def test_experts_meet_the_budget():
  architecture = Architecture(moe=MoEConfig(num_experts_per_token=2))
  model = fit(architecture, 4_000_000)
  flops = cost.forward_flops(model, 128)
  assert flops == pytest.approx(cost.forward_flops(BASE, 128), rel=0.01)
  parameters = cost.count_parameters(model).published
  assert parameters == pytest.approx(4_000_000, rel=0.03)


def test_shared_rows_keep_their_ratio():
  memory = dataclasses.replace(
    MEMORY, num_keys=100, shared_rows=40_000, placements=((1, 1), (2, 2))
  )
  model = fit(Architecture(memory=memory))
  ratio = model.memory.shared_rows / model.memory.num_keys**2
  assert ratio == pytest.approx(4, rel=1e-3)
  parameters = cost.count_parameters(model)
  assert parameters.published == pytest.approx(2_000_000, rel=0.03)


def test_widths_are_multiples():
  model = fit(Architecture(memory=MEMORY), width_multiple=4)
  assert model.mlp_dim % 4 == 0


def test_a_memory_that_leaves_nothing_is_refused():
  memory = dataclasses.replace(MEMORY, num_heads=512, key_dim=256)
  with pytest.raises(UserError, match=r'it: nothing is left of .* FLOPs'):
    fit(Architecture(memory=memory))


def test_a_total_below_the_dense_part_is_refused():
  with pytest.raises(UserError, match=r'no number of keys comes within 3%'):
    fit(Architecture(memory=MEMORY), 300_000)


def test_a_total_that_costs_all_flops_is_refused():
  memory = dataclasses.replace(MEMORY, key_dim=256, num_heads=4)
  with pytest.raises(UserError, match='it: no'):
    fit(Architecture(memory=memory), 400_000_000)


def test_a_coarse_multiple_is_refused():
  with pytest.raises(UserError, match='lower width_multiple'):
    fit(Architecture(memory=MEMORY), 1_900_000, width_multiple=230)
