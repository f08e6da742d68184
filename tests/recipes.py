"""Every file in `configs/`, discovered: its name and its `get_config`."""

import importlib.util
import pathlib

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def _get_config(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config


RECIPES = {
  path.stem: _get_config(path) for path in sorted(CONFIGS.glob('*.py'))
}
