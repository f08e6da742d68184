# SPDX-License-Identifier: Apache-2.0
"""What the guide to fine-tuning says of adapters, runs."""

import re
import shlex

import pytest
from commands import exit_code
from documents import PAGES, blocks
from inference.small_run import save_untrained
from published import write_published

from jaxsparse import config as c
from jaxsparse.config import fields

GUIDE = 'docs/guides/finetuning.md'
# Of runs that are to be over soon.
SHORT = [
  f'--config.{name}'
  for name in (
    'train.num_steps=2', 'train.sample_tokens=0', 'data.batch_size=8',
    'data.seq_len=16', 'data.cache_dir=cache',
  )
]  # fmt: skip


@pytest.mark.slow
def test_commands_of_adapters_run_one_after_another(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  model = c.ModelConfig(
    num_layers=1, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4,
    mlp_dim=8, vocab_size=257,
  )  # fmt: skip
  (tmp_path / 'runs' / 'base').mkdir(parents=True)
  save_untrained(tmp_path / 'runs' / 'base', model)
  write_published(tmp_path / 'smollm2')
  (tmp_path / 'news').mkdir()
  for name in ('a', 'b', 'c'):
    text = f'The sea is {name} calm tonight, and the tide is full. ' * 40
    (tmp_path / 'news' / f'{name}.txt').write_text(text)
  for line in ''.join(blocks(GUIDE, 'bash')).splitlines():
    argv = shlex.split(line)[1:]
    argv += SHORT if argv[0] == 'train' else []
    assert exit_code(argv) == 0, line
  said = capsys.readouterr().out
  assert said.count('The sea is') >= 3
  assert 'parameters are trained, in adapters of 2 matrices' in said
  assert 'as a LlamaForCausalLM' in said


def test_settings_of_the_guide_are_all_there():
  rows = re.findall(r'^\| (`[^|]*`) \|', PAGES[GUIDE], re.MULTILINE)
  named = re.findall(r'`(\w+)`', ' '.join(rows))
  assert {*fields.hints(c.AdapterConfig)} - {'kind'} <= {*named}
