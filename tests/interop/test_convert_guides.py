# SPDX-License-Identifier: Apache-2.0
"""What the guides of import and export say, runs."""

import contextlib
import io
import re
import shlex

import pytest
from commands import exit_code
from documents import PAGES, blocks
from published import write_published

from jaxsparse.cli import convert
from jaxsparse.interop import hugging_face

IMPORT, EXPORT, UPCYCLE = (
  f'docs/guides/{name}.md' for name in ('import', 'export', 'upcycle')
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """With a checkpoint where the guides have theirs."""
  path = tmp_path_factory.mktemp('guides')
  write_published(path / 'smollm2')
  return path


def test_commands_of_the_guides_run_one_after_another(folder, monkeypatch):
  monkeypatch.chdir(folder)
  said = []
  for page in (IMPORT, EXPORT, UPCYCLE):
    for line in ''.join(blocks(page, 'bash')).splitlines():
      with contextlib.redirect_stdout(io.StringIO()) as out:
        assert exit_code(shlex.split(line)[1:]) == 0, line
      said.append(out.getvalue())
  imported, written, exported, again, _, with_memory = said
  assert 'jaxsparse serve --model-path=runs/smollm2' in imported
  assert written.startswith('The sea is')
  assert with_memory.startswith('The sea is')
  assert 'as a LlamaForCausalLM' in exported
  assert 'parameters are in runs/again' in again
  names = {}
  exec(*blocks(IMPORT, 'py'), names)
  assert names['logits'].shape == (1, 3, 320)


def test_tables_of_the_guides_name_all_families():
  all_read = (*hugging_face.FAMILIES, *hugging_face.READ_ONLY)
  types = [name for of in all_read for name in of.MODEL_TYPES]
  classes = [c for of in hugging_face.FAMILIES for c in of.MODEL_TYPES.values()]
  rows = re.findall(r'^\| (`.*?) \|', PAGES[IMPORT], re.MULTILINE)
  assert re.findall(r'`(\w+)`', ' '.join(rows))[1:] == types
  assert re.findall(r'^\| `(\w+)` \|', PAGES[EXPORT], re.M) == classes


def test_help_names_every_direction(capsys):
  assert exit_code(['convert', '--help']) == 0
  page = capsys.readouterr().out
  for name in convert.DIRECTIONS:
    assert f'  {name} ' in page
    assert exit_code(['convert', name, '--help']) == 0
    assert f'jaxsparse convert {name}' in capsys.readouterr().out
