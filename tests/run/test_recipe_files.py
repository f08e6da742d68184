# SPDX-License-Identifier: Apache-2.0
"""Recipes and suites: found by path or name, and made in the size asked for."""

import shutil

import pytest
from recipes import CONFIGS, RECIPES

from jaxsparse.config import Config
from jaxsparse.config.errors import UserError
from jaxsparse.experiments.compare import suite as suite_lib
from jaxsparse.run import recipe_files
from jaxsparse.run.command_line import read_recipe

# With two sizes, and none.
SIZED = """
from jaxsparse import config as c

SIZES = {'s': 8, 'm': 16}

def get_config(size):
  return c.Config(data=c.DataConfig(batch_size=SIZES[size]))
"""
PLAIN = """
from jaxsparse import config as c

def get_config():
  return c.Config()
"""


@pytest.fixture
def folder(monkeypatch, tmp_path):
  """The current one, with recipes of the user's own."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs/sized.py').write_text(SIZED)
  (tmp_path / 'configs/plain.py').write_text(PLAIN)
  return tmp_path


def refused(name):
  with pytest.raises(UserError) as raised:
    read_recipe(name)
  sentence = str(raised.value)
  assert '\n' not in sentence
  assert sentence.endswith('.')
  return sentence


@pytest.mark.parametrize(
  'name', ['sized:m', 'configs/sized.py:m', '{folder}/configs/sized.py:m']
)
def test_a_size_is_named_after_a_colon(name, folder):
  assert read_recipe(name.format(folder=folder)).data.batch_size == 16


def test_one_without_sizes_needs_none(folder):
  assert read_recipe('plain') == read_recipe('configs/plain.py') == Config()
  assert 'there are no sizes, got' in refused('plain:s')


def test_a_path_may_hold_a_colon(folder):
  (folder / 'a:b.py').write_text(SIZED)
  assert read_recipe('a:b.py:m').data.batch_size == 16
  (folder / 'c:d').write_text(PLAIN)
  assert read_recipe('c:d') == Config()


def test_the_only_size_may_be_left_out():
  assert read_recipe('peer') == RECIPES['peer:tiny']()


@pytest.mark.parametrize(
  ('name', 'got'), [('ultramem', 'none'), ('ultramem:68m', "'68m'")]
)
def test_of_several_one_must_be_named(name, got):
  sentence = refused(name)
  sizes = 'tiny, 151m, 680m, 1b6, 227m_release'
  assert f'size must be one of {sizes}, as in ultramem:tiny; got {got}' in (
    sentence
  )


@pytest.mark.parametrize('new', RECIPES)
def test_former_names_end_in_a_sentence_with_the_new_one(new):
  old = new.replace(':', '_')
  assert refused(old) == f'--config={old} is --config={new} now.'
  path = f'configs/{old}.py'
  assert refused(path) == f'--config={path} is --config={new} now.'


def test_names_are_listed_and_no_file_is_run(folder):
  (folder / 'configs/broken.py').write_text('SIZES = {')
  (folder / 'configs/_parts.py').touch()
  (folder / 'configs/bomb.py').write_text('raise SystemExit')
  names = recipe_files.names('configs')
  assert names[:5] == ['bomb', 'broken', 'plain', 'sized:s', 'sized:m']
  assert names[5:] == list(RECIPES)
  assert 'facts' in recipe_files.names('configs/compare')


def test_what_comes_with_jaxsparse_is_no_namesake(folder):
  (folder / 'configs/peer.py').write_text(PLAIN)
  assert read_recipe('peer') == Config()
  assert recipe_files.shipped('peer') == RECIPES['peer:tiny']() != Config()


def test_an_installed_package_has_them_within(monkeypatch, tmp_path):
  """And takes no folder beside the package for its own."""
  package = tmp_path / 'site/jaxsparse'
  shutil.copytree(CONFIGS, package / 'recipes')
  other = tmp_path / 'site/configs'
  other.mkdir()
  (other / 'other.py').touch()
  expected = {name: make() for name, make in RECIPES.items()}
  monkeypatch.setattr(recipe_files, '_PACKAGE', package)
  monkeypatch.chdir(tmp_path)
  assert recipe_files.names('configs') == list(RECIPES)
  assert read_recipe('ultramem:680m') == expected['ultramem:680m']
  (package / 'recipes/peer.py').write_text(PLAIN)
  assert read_recipe('peer') == Config()
  assert suite_lib.load('facts').people == (500, 1000)
