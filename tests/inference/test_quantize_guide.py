# SPDX-License-Identifier: Apache-2.0
"""What the guide to quantized models says, runs."""

import dataclasses
import shlex

import pytest
from commands import exit_code
from documents import PAGES, blocks
from slot_models import MODELS
from small_run import save_untrained

from jaxsparse.ops.quantized_matrix import KINDS
from jaxsparse.ops.tables import row_format

GUIDE = 'docs/guides/quantize.md'


@pytest.mark.slow
def test_commands_of_the_guide_run_one_after_another(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  folder = tmp_path / 'runs' / 'ultramem'
  folder.mkdir(parents=True)
  model = dataclasses.replace(MODELS['small'], vocab_size=257)
  save_untrained(folder, model)
  (tmp_path / 'text.txt').write_text('The sea is calm tonight. ' * 9)
  commands = ''.join(blocks(GUIDE, 'bash')).splitlines()
  for line in commands:
    assert exit_code(shlex.split(line)[1:]) == 0, line
  said = capsys.readouterr().out
  assert 'bits per byte before' in said
  assert said.count('The sea is') >= 2
  names = {}
  exec(*blocks(GUIDE, 'py'), names)
  assert names['logits'].shape == (1, 3, 257)


def test_tables_of_the_guide_name_all_kinds():
  for kind in (*KINDS, *row_format.KINDS):
    assert f'| `{kind}` |' in PAGES[GUIDE]
  for kind in ('int8', 'int4'):
    (line,) = (
      line
      for line in PAGES[GUIDE].splitlines()
      if line.startswith(f'| `{kind}`') and 'bytes' not in line
      and line.endswith(f'| {row_format.row_bytes(256, kind)} |')
    )  # fmt: skip
    assert line
