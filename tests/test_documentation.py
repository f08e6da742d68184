# SPDX-License-Identifier: Apache-2.0
"""What the README and the documentation say, runs, and their links lead on."""

import re
import shlex
import subprocess

import flax.linen as nn
import jax
import numpy as np
import pytest
import yaml
from documents import DOCS, PAGES, ROOT, blocks, generator

import jaxsparse
from jaxsparse.cli import command
from jaxsparse.config import Config
from jaxsparse.run import command_line, recipe_files

PYTHON = [page for page in PAGES if blocks(page, 'python')]
# Names of recipes that stand for any, and for a reader's own.
OTHERS = ('NAME', '...', '$config', 'my_recipe.py:small')


COMPILED = {
  name: jax.jit(
    getattr(nn.Module, name),
    static_argnums=0,
    static_argnames=('method', 'mutable', 'capture_intermediates'),
  )
  for name in ('init_with_output', 'apply')
}


@pytest.fixture(autouse=True)
def _compiled_layers(monkeypatch):
  """A layer is one program instead of a hundred small ones."""
  for name, function in COMPILED.items():
    monkeypatch.setattr(nn.Module, name, function)


@pytest.mark.parametrize('page', PYTHON)
def test_blocks_run_one_after_another(page):
  names = {}
  for block in blocks(page, 'python'):
    exec(compile(block, page, 'exec'), names)
  if page == 'README.md':
    check_layer(names)
  for size in names.get('SIZES', ()):
    assert isinstance(names['get_config'](size), Config)


def check_layer(names):
  assert names['y'].shape == (2, 16, 128)
  params = names['params']
  table = params['params']['MemoryLayer_0']['value_table']
  assert table.shape == (4096, 64)

  def loss(params):
    y, aux_loss = names['Block']().apply(params, names['x'])
    return y.sum() + aux_loss

  gradient = jax.jit(jax.grad(loss))(params)
  touched = np.any(gradient['params']['MemoryLayer_0']['value_table'], axis=1)
  assert 0 < touched.sum() <= 2 * 16 * 32


def test_layer_trains_in_nnx():
  from flax import nnx

  names = {}
  exec(blocks('docs/quickstart.md', 'python')[-1], names)

  def loss(module):
    return module(names['x'])[0].sum()

  gradient = nnx.jit(nnx.grad(loss))(names['layer'])
  assert np.any(gradient['value_table'])


def test_recipes_and_fields_of_commands_are_there():
  for page, text in PAGES.items():
    for name in re.findall(r'--config=(\S+?)[`,;.)]*(?=\s|$)', text):
      if name not in OTHERS:
        overrides = []
        command_line.read_recipe(name.rstrip('\\'), overrides)
    for line in re.findall(r'^jaxsparse .*|^.*train\.py --.*', text, re.M):
      if page != 'docs/recipes.md':
        check_command(line)


def check_command(line):
  """That its command and fields are ours; `read_recipe` refuses others."""
  arguments = shlex.split(line.split('#')[0])
  if arguments[0] == 'jaxsparse':
    assert arguments[1] in command.COMMANDS, line
  fields = [a for a in arguments if a.startswith('--config.')]
  recipe = [a[9:] for a in arguments if a.startswith('--config=')]
  if fields and recipe and recipe[0] not in OTHERS:
    command_line.read_recipe(recipe[0], fields, say=lambda _: None)


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
  for link in re.findall(r'\]\(([^)#\s]+)\)', PAGES[page]):
    if not link.startswith('http'):
      assert ((ROOT / page).parent / link).exists(), link


def test_readme_is_short_and_has_two_commands():
  lines = PAGES['README.md'].splitlines()
  assert len(lines) <= 120
  commands = [line for line in lines if line.startswith('python -m venv ')]
  assert len(commands) == 2
  assert all(len(line) <= 120 for line in lines if line not in commands)


def test_files_to_start_from_are_read():
  for script in ('requeue.sbatch', 'tpu_vm.sh'):
    file = DOCS / 'examples' / script
    subprocess.run(['bash', '-n', file], check=True)
    check_command_of(file.read_text())
  jobset = yaml.safe_load((DOCS / 'examples' / 'jobset.yaml').read_text())
  (job,) = jobset['spec']['replicatedJobs']
  pods = job['template']['spec']
  (container,) = pods['template']['spec']['containers']
  assert f'--num_processes={pods["completions"]}' in container['args']
  name = jobset['metadata']['name']
  address = f'--coordinator={name}-{job["name"]}-0-0.{name}:1234'
  assert address in container['args']
  check_command_of(' '.join([*container['command'], *container['args']]))


def check_command_of(text):
  """That the recipe that a script names is there."""
  (name,) = re.findall(r'(?:--config=|CONFIG:-)([\w:]+)', text)
  command_line.read_recipe(name)


def test_public_names_are_in_the_reference():
  page = PAGES['docs/api.md']
  for name in jaxsparse.__all__:
    is_settings = name.endswith('Config')
    assert (f'### {name}\n' if is_settings else name) in page, name


def test_every_recipe_is_on_its_page():
  for name in recipe_files.names('configs'):
    assert f'`{name}`' in PAGES['docs/recipes.md']


def test_generated_pages_are_those_of_the_results():
  for name, text in generator().pages().items():
    assert (DOCS / name).read_text() == text, 'run python docs/generate.py'


def test_pictures_are_drawn(tmp_path):
  import drawings

  drawings.draw_all(tmp_path)
  for picture in tmp_path.iterdir():
    assert (DOCS / 'pictures' / picture.name).exists()
  floors = drawings.floors()
  assert floors['config'] == 1
  assert max(floors.values()) <= 7
