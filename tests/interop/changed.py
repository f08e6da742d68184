# SPDX-License-Identifier: Apache-2.0
"""Changes to a copy of a published checkpoint, and how its import ends."""

import json
import re
import shutil

from commands import exit_code
from imported import HF
from safetensors.numpy import load_file, save_file

WHOLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'


def set_fields(**fields):
  """Changes fields of config.json; `...` takes one away."""

  def change(folder):
    path = folder / 'config.json'
    content = json.loads(path.read_text()) | fields
    content = {k: v for k, v in content.items() if v is not ...}
    path.write_text(json.dumps(content))

  return change


def set_tensors(make):
  """Changes the tensors by a function of their dictionary."""

  def change(folder):
    tensors = load_file(folder / WHOLE)
    make(tensors)
    save_file(tensors, folder / WHOLE)

  return change


def set_bytes(name, make):
  def change(folder):
    path = folder / name
    path.write_bytes(make(path.read_bytes()))

  return change


def set_index(make):
  def change(folder):
    path = folder / INDEX
    index = json.loads(path.read_text())
    make(index['weight_map'])
    path.write_text(json.dumps(index))

  return change


def gone(name):
  return lambda folder: (folder / name).unlink()


def assert_refused(fixture, change, said, tmp_path, capsys):
  """The command ends in one sentence with `said`, and leaves nothing."""
  folder, workdir = tmp_path / 'in', tmp_path / 'w'
  shutil.copytree(HF / fixture, folder, copy_function=shutil.copyfile)
  change(folder)
  argv = ['convert', 'from-hf', str(folder), f'--workdir={workdir}']
  assert exit_code(argv) == 2
  error = capsys.readouterr().err
  assert re.fullmatch(r'error: [^\n]+\.\n', error), error
  assert said in error
  assert not workdir.exists() or not [*workdir.iterdir()]
