# SPDX-License-Identifier: Apache-2.0
"""Adapters in files are what was written, or a sentence."""

import json

import numpy as np
import pytest

from jaxsparse.config import AdapterConfig
from jaxsparse.config.errors import UserError
from jaxsparse.run import adapter_files

TENSORS = {
  'block_00/attention/query/a': np.ones((4, 2), np.float32),
  'block_00/attention/query/b': np.zeros((2, 2, 2), np.float32),
}
META = dict(kind='lora', base='f' * 64, steps=3)


@pytest.fixture
def folder(tmp_path):
  adapter_files.write(tmp_path / 'x', TENSORS, META)
  return tmp_path / 'x'


def test_what_is_read_is_what_was_written(folder):
  tensors, meta = adapter_files.read(folder)
  assert tensors.keys() == TENSORS.keys()
  for name, x in TENSORS.items():
    np.testing.assert_array_equal(tensors[name], x)
  assert META.items() <= meta.items()
  assert meta['format'] == 1


def test_a_later_adapter_takes_its_place(folder):
  later = {name: x + 1 for name, x in TENSORS.items()}
  adapter_files.write(folder, later, META | dict(steps=4))
  tensors, meta = adapter_files.read(folder)
  assert meta['steps'] == 4
  np.testing.assert_array_equal(tensors['block_00/attention/query/b'], 1)
  names = {path.name for path in folder.iterdir()}
  assert names == {'adapter.json', 'adapter.safetensors'}


def cut(folder):
  file = folder / 'adapter.safetensors'
  file.write_bytes(file.read_bytes()[:-4])


def flipped(folder):
  file = folder / 'adapter.safetensors'
  content = bytearray(file.read_bytes())
  content[-5] ^= 1
  file.write_bytes(content)


def not_finite(folder):
  broken = {name: x * np.float32('nan') for name, x in TENSORS.items()}
  adapter_files.write(folder, broken, META)


def changed(**fields):
  def change(folder):
    file = folder / 'adapter.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))

  return change


@pytest.mark.parametrize(
  ('damage', 'message'),
  [
    (cut, r"can't be read \(.*it is cut off or damaged"),
    (flipped, 'is not what was written with it: it is cut off or damaged'),
    (not_finite, 'query/. in .* holds what is not a finite number'),
    (
      lambda folder: (folder / 'adapter.safetensors').unlink(),
      r"can't be read \(.*No such file",
    ),
    (
      lambda folder: (folder / 'adapter.json').unlink(),
      'there is no adapter in .* which holds no adapter.json',
    ),
    (lambda folder: (folder / 'adapter.json').write_text('{'), 'is damaged'),
    (changed(kind='new'), 'is damaged'),
    (changed(format=2), 'has the format 2, and this version .* reads 1'),
  ],
)
def test_what_is_wrong_is_said_in_a_sentence(folder, damage, message):
  damage(folder)
  with pytest.raises(UserError, match=message):
    adapter_files.read(folder)


def test_an_adapter_of_another_base_is_refused(folder):
  meta = adapter_files.read_meta(folder)
  adapter_files.require_base(folder, meta, 'f' * 64)
  adapter_files.require_base(folder, meta, 'e' * 64, is_forced=True)
  with pytest.raises(UserError, match='was trained beside other parameters'):
    adapter_files.require_base(folder, meta, 'e' * 64)


def test_settings_come_back():
  config = AdapterConfig(
    kind='lora', rank=3, alpha=2.0, dropout=0.5, use_rslora=True, targets='mlp'
  )
  content = config.to_json()
  assert AdapterConfig.from_json(content | META) == config
  del content['r']
  with pytest.raises(UserError, match=r"adapter.json must have 'r'"):
    AdapterConfig.from_json(content | META)
