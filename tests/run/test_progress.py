# SPDX-License-Identifier: Apache-2.0
"""What a terminal shows, and what a log has."""

import os
import pathlib
import pty
import subprocess
import sys

from jaxsparse.run.progress import Reporter

ROOT = pathlib.Path(__file__).parents[2]

PROGRAM = """
import time
from jaxsparse.run.progress import Reporter

reporter = Reporter()
with reporter.steps(0, 3, 'training'):
  time.sleep(0.2)
  print('SHOWN', flush=True)
  reporter.show(1, 3, {'loss': 1.0}, 5.0, is_logged=True)
  with reporter.steps(0, 2, 'validation', compiles=False):
    time.sleep(0.2)
"""


def run(stdout):
  subprocess.run(
    [sys.executable, '-c', PROGRAM],
    env=os.environ | {'PYTHONPATH': str(ROOT), 'TERM': 'xterm'},
    stdout=stdout,
    check=True,
  )


def test_a_log(tmp_path):
  with (tmp_path / 'log').open('w') as log:
    run(log)
  assert (tmp_path / 'log').read_text().splitlines() == [
    'Compiling training ...',
    'SHOWN',
    'step 1/3  loss 1.0000  0:05 left',
  ]


def test_a_terminal():
  controller, terminal = pty.openpty()
  run(terminal)
  os.close(terminal)
  text = os.read(controller, 1 << 16).decode()
  os.close(controller)
  before, _, after = text.partition('SHOWN')
  assert 'Compiling ...' in before
  assert 'loss 1.0000' in after
  assert 'Compiling ...' not in after[after.index('validation') :]


def test_lines_name_their_unit(capsys):
  reporter = Reporter()
  with reporter.steps(0, 9, 'parameters imported', False, 'parameters'):
    reporter.show(4, 9, {}, is_logged=True)
  assert capsys.readouterr().out == 'parameters 4/9\n'
