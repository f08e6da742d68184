# SPDX-License-Identifier: Apache-2.0
"""States that version 0.1.0 saved are found in today's, to the last bit."""

import functools
import pathlib
import tarfile

import jax
import numpy as np
import pytest
from small_model import make_mesh

from jaxsparse import mesh
from jaxsparse.run import run_config, stored
from jaxsparse.training import former_state
from jaxsparse.training.step import init_state

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'


def named(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): np.asarray(x)
    for path, x in jax.tree.leaves_with_path(tree)
  }


@pytest.mark.parametrize(
  ('archive', 'is_by_rows'),
  [('workdir_0_1_0', True), ('workdir_0_1_0_adamw', False)],
)
def test_a_state_is_restored(archive, is_by_rows, tmp_path):
  with tarfile.open(FIXTURES / f'{archive}.tar.gz') as files:
    files.extractall(tmp_path, filter='data')
  config = run_config.read(tmp_path / 'w', print)
  with jax.set_mesh(make_mesh((1, 1, 1))):
    now = mesh.abstract(
      functools.partial(init_state, config), mesh=jax.sharding.get_mesh()
    )
    former = former_state.layout(config, now.params)
    assert (former is not None) == is_by_rows
    layout, *others = (
      dict(params=now.params, optimizer=dict(step=now.step, opt_state=state))
      for state in (now.opt_state, former)
      if state is not None
    )
    folder = stored.folder_of(tmp_path / 'w')
    arrays, _ = stored.read(folder, 3, layout, others)
    saved = arrays['optimizer']['opt_state']
    found = former_state.converted(
      saved, former, now.opt_state, lambda: None, is_by_rows
    )
  assert jax.tree.structure(found) == jax.tree.structure(now.opt_state)
  for (name, x), y in zip(
    named(found).items(), jax.tree.leaves(now.opt_state), strict=True
  ):
    assert (x.shape, x.dtype) == (y.shape, y.dtype), name
  found, saved = named(found), named(saved)
  if not is_by_rows:
    assert found.keys() == saved.keys()
    return
  group = 'inner_states/values/inner_state'
  for name, place in (
    ('mu', 'block_00/memory/value_table'),
    ('touched', 'block_00/memory/value_table'),
  ):
    x = found[f'{group}/{name}/{place}']
    np.testing.assert_array_equal(x, saved[f'tables/{name}/{place}'])
    assert np.any(x)
  for name, x in found.items():
    if not name.startswith(group):
      np.testing.assert_array_equal(x, saved[f'rest/{name}'], name)
