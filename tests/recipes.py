# SPDX-License-Identifier: Apache-2.0
"""Every recipe in `configs/`, discovered, and what makes its config."""

import dataclasses
import functools
import pathlib
import re

import jax

from jaxsparse.run import recipe_files
from jaxsparse.training import optimizer

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'

RECIPES = {
  name: functools.partial(recipe_files.shipped, name)
  for name in recipe_files.names('configs')
}


def check_groups(params):
  """That no bias, scale of a norm or core decays, and all else but tables."""
  groups = optimizer.labels(params)
  for path, group in jax.tree.leaves_with_path(groups):
    name = path[-1].key
    expected = 'decayed'
    if re.search('bias|scale|cores|temperature', name):
      expected = 'balance' if name == 'router_bias' else 'undecayed'
    elif name in ('value_table', 'pre_value_table'):
      expected = 'values'
    assert group == expected, jax.tree_util.keystr(path)


def cut(model):
  """The model's first blocks: as few as have one of each kind.

  That is one memory layer, or two that share tables.
  """
  memory, num_blocks = model.memory, len(model.attention_pattern)
  if memory:
    step = int(memory.placements[0][1] > memory.placements[0][0])
    count = 2 if memory.shared_rows else 1
    placements = ((0, step), (1, 1 + step))[
      : min(count, len(memory.placements))
    ]
    num_blocks = max(num_blocks, placements[-1][1] + 1)
    memory = dataclasses.replace(memory, placements=placements)
  return dataclasses.replace(model, num_layers=num_blocks, memory=memory)
