# SPDX-License-Identifier: Apache-2.0
"""Every recipe: discovered, validated and traced at pod scale without devices.

One train step of each, cut to a block of each kind, is traced on an abstract
mesh of 4,096 devices (fewer where experts do not divide over 64), which proves
that its shapes divide and that no sharding is left undecided. The leaves of the
same trace are counted against the closed form. The slow lane traces all blocks.
"""

import dataclasses
import functools
import math
import re

import jax
import pytest
from recipes import CONFIGS, RECIPES, check_groups, cut

from jaxsparse import config as config_lib
from jaxsparse import mesh
from jaxsparse.analysis import run_cost
from jaxsparse.config import fields, saved_config
from jaxsparse.run import help_pages, recipe_files
from jaxsparse.training.compile_beside import batch_shapes
from jaxsparse.training.step import init_state, train_step

# 16 on `data`: the tables' rows, num_keys ** 2, divide by 16 in every recipe,
# and by more in some only.
DATA, SPARSE, MODEL = 16, 64, 4

# What the tokenizer of the byte recipes has: 256 bytes and the boundary.
BYTES = 257

# Most parameters that a recipe may have, embeddings included, in millions.
MAX_MILLIONS = {
  'dense:tiny': 0.84,
  'dense:151m': 203,
  'dense:680m': 757,
  'dense:1b6': 1714,
  'ultramem:tiny': 1.89,
  'continued:rewarmed': 1.89,
  'continued:infinite': 1.89,
  'continued:annealed': 1.89,
  'ultramem:151m': 2084,
  'ultramem:680m': 9007,
  'ultramem:1b6': 21_500,
  'ultramem:227m_release': 1232,
  'moe:tiny': 1.93,
  'olmoe:tiny': 6.25,
  'moe:151m': 2091,
  'moe:680m': 9026,
  'moe:1b6': 21_463,
  'olmoe:227m': 1220,
  'pkm:tiny': 1.88,
  'pkm:151m': 1759,
  'peer:tiny': 1.87,
  'memory_plus:tiny': 1.87,
  'memory_plus:227m': 1236,
  'ultramem_v2:tiny': 1.88,
  'ultramem_v2:227m': 1232,
  'ultramem_v2:1b': 6799,
  'dcformer:tiny': 0.29,
  'sparse_attention:tiny': 0.365,
  'joined:tiny': 1.92,
  'multimodal:emoji': 0.202,
  'multimodal:shapes': 0.293,
  'multimodal:shapes_late': 0.12,
  'multimodal:four_shapes': 0.293,
  'multimodal:four_shapes_late': 0.12,
  'multimodal:frames': 0.288,
  'multimodal:frames_routed': 0.293,
  'multimodal:frames_covered': 0.293,
  'dcformer:405m': 420,
  'dcformer:834m': 853,
  'dcformer:1b4': 1454,
  'dcformer:2b8': 2850,
  'dcformer:6b9': 6975,
  'dcpythia:2b8': 2830,
  'dcpythia:6b9': 6944,
}


# Another model of the same kind, but for sizes, is in the default suite.
LARGER = (':680m', ':1b', ':1b6', ':834m', ':1b4', ':2b8', ':6b9')
LARGER += (':405m', ':227m', ':227m_release', 'pkm:151m', 'moe:151m')
# Of whose kind another, with more to it, is there: 'dense:151m',
# 'ultramem:151m', 'olmoe:tiny', 'peer:tiny' and 'ultramem_v2:tiny'; the last
# joins parts that are all there, and is traced on one device.
LESS = ('dense:tiny', 'ultramem:tiny', 'moe:tiny', 'pkm:tiny')
LESS += ('memory_plus:tiny', 'joined:tiny')
# With the model of another, or with more to choose from.
LESS += ('multimodal:emoji', 'multimodal:shapes_late', 'multimodal:frames')
LESS += ('multimodal:four_shapes', 'multimodal:four_shapes_late')
LESS += ('multimodal:frames_covered',)
LESS += ('continued:rewarmed', 'continued:infinite', 'continued:annealed')
TRACED = [
  pytest.param(
    name,
    marks=[pytest.mark.slow] if name.endswith(LARGER) or name in LESS else [],
  )
  for name in sorted(RECIPES)
]


def _mesh(config):
  moe = config.model.moe
  sparse = math.gcd(moe.num_experts, SPARSE) if moe else SPARSE
  return jax.sharding.AbstractMesh(
    (DATA, sparse, MODEL),
    mesh.AXES,
    axis_types=(jax.sharding.AxisType.Explicit,) * 3,
  )


def _pod_config(name):
  """The recipe with its vocabulary resolved and a batch that devices divide.

  Only the tiny recipes and the release's, with 768 sequences, have batches that
  do not: they are for fewer devices.
  """
  config = config_lib.validated(RECIPES[name]())
  shards = math.prod(_mesh(config).axis_sizes[:2])
  rows = shards * math.ceil(config.data.batch_size / shards)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(
      config.model, vocab_size=config.model.vocab_size or BYTES
    ),
    data=dataclasses.replace(config.data, batch_size=rows),
  )


def _batch(config, devices):
  return {
    name: jax.ShapeDtypeStruct(
      shape,
      dtype,
      sharding=jax.sharding.NamedSharding(
        devices, mesh.act('B' + '.' * (len(shape) - 1))
      ),
    )
    for name, (shape, dtype) in batch_shapes(config).items()
  }


def test_every_recipe_has_a_stated_size():
  assert set(RECIPES) == set(MAX_MILLIONS)


@pytest.mark.parametrize('name', sorted(RECIPES))
def test_recipe_survives_json(name):
  config = config_lib.validated(RECIPES[name]())
  assert saved_config.from_json(saved_config.to_json(config)) == config


FILES = sorted(CONFIGS.glob('*.py'))


def test_every_recipe_is_found():
  """Those that are told of have sizes, and each file has."""
  assert {name.partition(':')[0] for name in RECIPES} == {f.stem for f in FILES}
  assert all(':' in name for name in RECIPES)


def _sections(path):
  """The part of a recipe's docstring on each size."""
  docstring = path.read_text().split('"""')[1]
  parts = re.split(r'\n\n(?=\w+(?:, \w+)*\n  Reproduces: )', docstring)[1:]
  return [
    (size, part)
    for part in parts
    for size in part.partition('\n')[0].split(', ')
  ]


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_docstring_has_command_and_every_size(path):
  text = path.read_text()
  sizes = [size for size, _ in _sections(path)]
  assert sizes == list(recipe_files.sizes(path))
  commands = re.findall(rf'--config=configs/{path.name}:(\w+)', text)
  assert commands
  assert set(commands) <= set(sizes)
  for size, part in _sections(path):
    for word in ('Reproduces: ', 'Hardware: ', 'Result: '):
      assert part.count(f'\n  {word}') == 1
    of_ours = size == 'tiny' or path.stem == 'multimodal'
    assert of_ours or re.search(r'arXiv:\d{4}\.\d{5}', part)


@functools.cache
def _trace(name, is_whole=False):
  """Shapes before and after a step: of parameters and optimizer state."""
  config = _pod_config(name)
  if not is_whole:
    config = dataclasses.replace(config, model=cut(config.model))
  return _trace_on(_mesh(config), config)


def _trace_on(devices, config):
  def init_and_step(batch):
    before = init_state(config)
    after, metrics = train_step(config, before, batch)
    return (
      (before.params, before.opt_state),
      (after.params, after.opt_state),
      metrics,
    )

  with jax.sharding.use_abstract_mesh(devices):
    return jax.eval_shape(init_and_step, _batch(config, devices))


def _placed(tree):
  def placed(x):
    # Constants made under a mesh have no sharding: they are whole everywhere.
    spec = x.sharding.spec if x.sharding else jax.P()
    return x.shape, x.dtype, spec

  return jax.tree.map(placed, tree)


@pytest.mark.parametrize('name', TRACED)
def test_train_step_traces_on_a_pod(name):
  before, after, metrics = _trace(name)
  assert _placed(after) == _placed(before)
  assert metrics['loss'].shape == metrics['grad_norm'].shape == ()


# Others train on one device elsewhere.
ON_ONE_DEVICE = [
  name if name == 'joined:tiny' else pytest.param(name, marks=pytest.mark.slow)
  for name in sorted(RECIPES)
  if name.endswith(':tiny')
]


@pytest.mark.parametrize('name', ON_ONE_DEVICE)
def test_train_step_traces_on_one_device(name):
  """Axes of length 1 have a place in every product, too."""
  config = _pod_config(name)
  config = dataclasses.replace(config, model=cut(config.model))
  devices = jax.sharding.AbstractMesh(
    (1, 1, 1), mesh.AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 3
  )
  before, after, _ = _trace_on(devices, config)
  assert _placed(after) == _placed(before)


@pytest.mark.slow
@pytest.mark.parametrize('name', sorted(RECIPES))
def test_all_blocks_trace_on_a_pod(name):
  (params, _), _, metrics = _trace(name, is_whole=True)
  assert metrics['loss'].shape == ()
  expected = run_cost.parameters(_pod_config(name)).total
  assert sum(x.size for x in jax.tree.leaves(params)) == expected


@pytest.mark.parametrize('name', sorted(RECIPES))
def test_recipe_stays_within_its_size(name):
  millions = run_cost.parameters(_pod_config(name)).total / 1e6
  assert 0.98 * MAX_MILLIONS[name] < millions <= MAX_MILLIONS[name]


@pytest.mark.parametrize('name', TRACED)
def test_counting_leaves_gives_the_closed_form(name):
  (params, _), _, _ = _trace(name)
  config = _pod_config(name)
  config = dataclasses.replace(config, model=cut(config.model))
  expected = run_cost.parameters(config)
  leaves = [
    (jax.tree_util.keystr(path), leaf.size)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  ]
  assert sum(size for _, size in leaves) == expected.total
  tables = [size for path, size in leaves if path.endswith("value_table']")]
  assert sum(tables) == expected.values


@pytest.mark.parametrize('name', TRACED)
def test_large_leaves_are_spread(name):
  before, _, _ = _trace(name)
  for path, leaf in jax.tree_util.tree_leaves_with_path(before):
    where = jax.tree_util.keystr(path)
    # Sub-keys meet every token whole, and are few beside the values.
    if leaf.size >= 2**20 and not where.endswith("['keys']"):
      assert any(leaf.sharding.spec), f'{where} is whole on every device'


@pytest.mark.parametrize('name', TRACED)
def test_matrices_alone_are_decayed(name):
  (params, _), _, _ = _trace(name)
  check_groups(params)


@pytest.mark.parametrize('part', help_pages.PARTS)
def test_help_of_a_part_tells_every_field(part):
  text = help_pages.page('', '', part)
  path, cls = help_pages.PARTS[part]
  for name in fields.paths(cls):
    is_other_part = '.' in name
    assert (f'--config.{path}.{name}=' in text) != is_other_part


def test_help_of_all_parts_tells_every_field_once():
  lines = help_pages.page('', '', 'all').splitlines()
  flags = [
    line.split('=')[0].strip()
    for line in lines
    if line.startswith('  --config.') and '=' in line
  ]
  paths = [
    path
    for path in fields.paths(config_lib.Config)
    if not path.startswith(tuple(f'{part}.' for part in help_pages.ALIKE))
  ]
  assert sorted(flags) == sorted(f'--config.{path}' for path in paths)


def test_bare_help_fits_two_screens():
  text = help_pages.page('What it does.', 'Flags.')
  lines = text.splitlines()
  assert len(lines) < 50
  assert all(len(line) <= 80 for line in lines)
  for path in help_pages.START_HERE:
    assert f'--config.{path}=' in text
  for name in [*RECIPES, *help_pages.PARTS]:
    assert name in text
