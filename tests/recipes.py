# SPDX-License-Identifier: Apache-2.0
"""Every recipe in `configs/`, discovered, and what makes its config."""

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
    if re.search('bias|scale|cores', name):
      expected = 'balance' if name == 'router_bias' else 'undecayed'
    elif name in ('value_table', 'pre_value_table'):
      expected = 'values'
    assert group == expected, jax.tree_util.keystr(path)
