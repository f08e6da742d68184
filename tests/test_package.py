# SPDX-License-Identifier: Apache-2.0
"""What an installation offers: names, versions, and what each needs."""

import ast
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import jaxsparse

ROOT = pathlib.Path(__file__).parents[1]

# Refuses what only the extra `train` brings.
BARE = """
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path, target=None):
    if name.partition('.')[0] in {
      'grain', 'matplotlib', 'orbax', 'pyarrow', 'safetensors', 'sentencepiece',
      'tensorboardX', 'tensorflow_datasets', 'tokenizers', 'wandb',
    }:
      raise ModuleNotFoundError(f'{name} is for training', name=name)
sys.meta_path.insert(0, Missing())

import jaxsparse, jaxsparse.config
assert 'flax' not in sys.modules, 'a config alone brings Flax'
import jax
from jaxsparse import MemoryConfig, MemoryLayer
x = jax.numpy.ones((1, 2, 8))
layer = MemoryLayer(MemoryConfig(num_keys=8, num_selected=2))
key = jax.random.key(0)
(y, _), _ = jax.eval_shape(lambda x: layer.init_with_output(key, x), x)
assert y.shape == x.shape
for name in jaxsparse.__all__:
  if name != 'load':
    getattr(jaxsparse, name)

from jaxsparse.cli import command
command.main(['cost', '--config=CONFIG'])
for rest in (
  ['train', '--config=CONFIG', '--workdir=never'],
  ['convert', 'from-hf', 'never', '--workdir=never'],
):
  try:
    command.main(rest)
  except SystemExit as ending:
    assert ending.code == 2, ending
"""


def test_bare_installation_has_layers_costs_and_a_sentence_on_the_rest():
  config = f'{ROOT}/configs/ultramem.py:tiny'
  done = subprocess.run(
    [sys.executable, '-c', BARE.replace('CONFIG', str(config))],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert 'parameters' in done.stdout
  for line, name in zip(
    done.stderr.splitlines(), ('train', 'convert'), strict=True
  ):
    assert re.fullmatch(
      rf'error: jaxsparse {name} needs \w+, which is not installed: pip '
      r"install 'jaxsparse\[train\]'\.",
      line,
    )


def test_public_names_are_those_that_a_type_checker_sees():
  (block,) = [
    node
    for node in ast.parse(inspect.getsource(jaxsparse)).body
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name)
  ]
  seen = {
    alias.asname: (node.module, alias.name)
    for node in block.body
    for alias in node.names
  }
  homes = {
    name: (f'jaxsparse.{home}', name) for name, home in jaxsparse._HOMES.items()
  }
  assert seen == homes
  assert dir(jaxsparse) == sorted([*seen, '__version__'])
  for name in dir(jaxsparse):
    assert getattr(jaxsparse, name)
  with pytest.raises(AttributeError, match='no attribute'):
    _ = jaxsparse.MemoryLayers


def test_one_version():
  citation = (ROOT / 'CITATION.cff').read_text()
  assert f'version: {jaxsparse.__version__}\n' in citation
  assert f'## {jaxsparse.__version__}\n' in (ROOT / 'CHANGELOG.md').read_text()


def test_every_folder_is_packaged():
  folders = {path.parent for path in ROOT.glob('jaxsparse/**/*.py')}
  assert all((folder / '__init__.py').exists() for folder in folders)
