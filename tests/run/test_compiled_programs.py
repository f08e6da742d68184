# SPDX-License-Identifier: Apache-2.0
"""Native code is loaded only from a folder that is the user's own."""

import os

import jax
import pytest

from jaxsparse.run import compiled_programs


@pytest.fixture(autouse=True)
def restored():
  before = jax.config.jax_compilation_cache_dir
  yield
  jax.config.update('jax_compilation_cache_dir', before)


def kept(folder):
  said = []
  compiled_programs.keep(str(folder), said.append)
  return jax.config.jax_compilation_cache_dir, said


def test_the_folder_is_private(tmp_path):
  old = tmp_path / 'old' / 'compiled'
  old.mkdir(parents=True, mode=0o755)
  for name in ('new', 'old'):
    folder = tmp_path / name / 'compiled'
    assert kept(tmp_path / name) == (str(folder), [])
    assert folder.stat().st_mode & 0o777 == 0o700


def test_of_another_user(tmp_path, monkeypatch):
  kept(tmp_path)
  monkeypatch.setattr(os, 'geteuid', lambda: tmp_path.stat().st_uid + 1)
  folder, (said,) = kept(tmp_path)
  assert folder is None
  assert 'belongs to another user' in said


def test_where_others_can_put_another_folder(tmp_path):
  tmp_path.chmod(0o777)
  folder, (said,) = kept(tmp_path)
  assert folder is None
  assert 'other users can write' in said
  tmp_path.chmod(0o1777)
  assert kept(tmp_path)[0]


def test_in_a_file(tmp_path):
  (tmp_path / 'file').touch()
  folder, (said,) = kept(tmp_path / 'file')
  assert folder is None
  assert "can't be used (Not a directory)" in said
