# SPDX-License-Identifier: Apache-2.0
"""The guide of pictures: its commands run on shapes, its client is answered."""

import io
import re
import shlex
from contextlib import redirect_stdout

import pytest
import seeing_run
from commands import exit_code
from documents import PAGES, ROOT, blocks
from PIL import Image
from running import running

from jaxsparse.cli import generate, retrieve
from jaxsparse.data.pictures import decode
from jaxsparse.serving import command, pictures

PAGE = 'docs/guides/pictures.md'
COMMANDS = [
  shlex.split(line)[1:] for line in ''.join(blocks(PAGE, 'bash')).splitlines()
]
DRAW, ASK = blocks(PAGE, 'py')


def test_flags_and_limits_of_the_guide_are_there():
  parsers = dict(
    retrieve=retrieve.parse_arguments, generate=generate.parse_arguments
  )
  for name, *flags in COMMANDS:
    parsers.get(name, lambda flags: None)(flags)
  text = PAGES[PAGE]
  served = vars(command.parse_arguments(['--model-path=x']))
  own = vars(retrieve.parse_arguments(COMMANDS[1][1:]))
  for flag in set(re.findall(r'`--([a-z-]+)', text)) - {'config'}:
    assert flag.replace('-', '_') in served | own, flag
  assert f'{pictures.MOST_PIXELS:,} pixels' in text
  assert f'{pictures.MOST_BYTES >> 20} MiB' in text
  assert decode._KNOWN in text


def test_the_client_of_the_guide_runs(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  exec(DRAW, {})
  with running(
    template=pictures.CAPTIONS, pictures=seeing_run.config().multimodal
  ) as server:
    said = io.StringIO()
    with redirect_stdout(said):
      exec(ASK.replace('http://127.0.0.1:8080', server.url), {})
    job = server.engine.seen[-1]
  assert job.tokens == (256, *b'a red')
  assert job.picture.shape == (seeing_run.SIDE, seeing_run.SIDE, 3)
  assert said.getvalue().startswith('a reda red')


def test_pictures_of_the_guide_are_small_and_there():
  for name in (retrieve.SHEET, retrieve.ATTENTION):
    file = ROOT / 'docs' / 'pictures' / name
    assert f'](../pictures/{name})' in PAGES[PAGE]
    assert file.stat().st_size < 100_000
    with Image.open(file) as picture:
      assert picture.width < 1000


@pytest.mark.slow
def test_commands_run_one_after_another(tmp_path, monkeypatch, capsys):
  """Of fewer steps, and as a reader has them: on shapes."""
  monkeypatch.chdir(tmp_path)
  said = []
  for name, *flags in COMMANDS:
    if name == 'train':
      flags += ['--config.train.num_steps=60', '--config.data.cache_dir=cache']
    if name == 'generate':
      exec(DRAW, {})
    capsys.readouterr()
    assert exit_code([name, *flags]) == 0, capsys.readouterr().err
    said.append(capsys.readouterr().out)
  _, found, held_out, _, caption = said
  line = re.compile(r'^ *\d+ +0\.\d+  an? ', re.M)
  for text in (found, held_out):
    assert len(line.findall(text)) == 12
  assert 'trained on' in found
  assert held_out.count('(held out)') == 12
  for name in (retrieve.SHEET, retrieve.ATTENTION):
    with Image.open(tmp_path / 'runs' / 'shapes' / 'plots' / name) as picture:
      assert picture.width > 800
  words = r'(an?|red|green|blue|yellow|black|brown|purple|orange|left|of|above'
  words += r'|circle|square|triangle|cross)'
  assert re.fullmatch(rf'( ?{words})*\n', caption), caption
