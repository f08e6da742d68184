# SPDX-License-Identifier: Apache-2.0
"""A tokenizer with more tokens than the model has rows is refused by all.

Whose rows would be read in their place is not said by anything.
"""

import dataclasses
import pathlib
import sys

import pytest
from commands import exit_code

sys.path.append(str(pathlib.Path(__file__).parents[1] / 'inference'))

from small_run import save_untrained

from jaxsparse.config import ModelConfig

MODEL = ModelConfig(
  num_layers=1,
  model_dim=8,
  num_heads=1,
  num_kv_heads=1,
  head_dim=8,
  mlp_dim=8,
  vocab_size=96,
)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return save_untrained(tmp_path_factory.mktemp('w'), MODEL)


@pytest.mark.parametrize(
  'command',
  [
    'generate --workdir=W --prompt=a',
    'evaluate --workdir=W --text=W/config.json --output=W/out',
    'convert to-hf W/out --workdir=W',
    'serve --model-path=W --port=0',
  ],
)
def test_one_sentence(command, workdir, capsys):
  assert exit_code(command.replace('W', str(workdir)).split()) == 2
  error = capsys.readouterr().err
  assert "tokenizer.json' has 257 tokens, but the model knows 96" in error


def test_a_larger_table_is_none_of_it(workdir, tmp_path):
  wide = dataclasses.replace(MODEL, vocab_size=300)
  save_untrained(tmp_path, wide)
  assert (
    exit_code(f'convert to-hf {tmp_path}/out --workdir={tmp_path}'.split()) == 0
  )
