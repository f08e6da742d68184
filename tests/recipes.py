"""Every file in `configs/`, discovered: its name and its `get_config`."""

import importlib.util
import pathlib
import re

import jax

from jaxsparse.training import optimizer

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def _get_config(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config


RECIPES = {
  path.stem: _get_config(path) for path in sorted(CONFIGS.glob('*.py'))
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
