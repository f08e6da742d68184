# SPDX-License-Identifier: Apache-2.0
"""Output that can't be encoded, or that nobody reads, ends nothing."""

import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys

import pytest

from jaxsparse.cli import command
from jaxsparse.config.errors import UserError
from jaxsparse.run import command_line, workdir
from jaxsparse.run.progress import Reporter

ROOT = pathlib.Path(__file__).parents[2]
TEXT = 'def 日本 \ufffd \udcff'
ESCAPED = r'def \u65e5\u672c \ufffd \udcff'


@pytest.fixture(params=['ascii', 'latin-1', 'utf-8'])
def output(request):
  """Calls a function whose stdout and stderr have an encoding; what it wrote.

  Exits are part of that.
  """

  def call(function, *arguments):
    streams = [io.TextIOWrapper(io.BytesIO(), request.param) for _ in range(2)]
    out, err = streams
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      with contextlib.suppress(SystemExit):
        function(*arguments)
      for stream in streams:
        stream.flush()
    return [s.buffer.getvalue().decode(request.param) for s in streams]

  return call


def test_a_sentence_of_the_reporter(output):
  out, _ = output(lambda: Reporter().say(TEXT))
  assert out in (f'{ESCAPED}\n', f'{TEXT[:-1]}\\udcff\n')


def test_a_bar_of_the_reporter(output):
  def show():
    reporter = Reporter()
    with reporter.steps(0, 3, '日本'):
      reporter.show(1, 3, {'loss': 1.0}, 3.0, is_logged=True)

  out, _ = output(show)
  assert out.startswith('Compiling ')
  assert out.endswith('\nstep 1/3  loss 1.0000  0:03 left\n')


in_a_sentence = command_line.user_errors_end_in_a_sentence()


@in_a_sentence
def fail():
  print(TEXT)
  raise UserError(TEXT)


def test_the_sentence_of_an_error(output):
  out, err = output(fail)
  assert out.startswith('def ')
  assert err.startswith('error: def ')


@pytest.mark.parametrize(
  'arguments',
  [
    ['train', '--config=日本\udcff.py', '--workdir=x'],
    ['cost', '--config=日本\udcff.py'],
    ['report', '日本\udcff'],
    ['generate', '--workdir=日本\udcff'],
    ['compare', '--suite=日本\udcff.py', '--workdir=x'],
    ['bench', '日本\udcff'],
    ['日本\udcff'],
  ],
  ids=lambda arguments: arguments[0][:8].encode('ascii', 'replace').decode(),
)
def test_every_command_names_what_it_can_t_print(output, arguments):
  _, err = output(command.main, arguments)
  assert r'\u65e5\u672c' in err or '日本' in err


def run(program, **environment):
  return subprocess.run(
    [sys.executable, '-c', program],
    env=os.environ | {'PYTHONPATH': str(ROOT), **environment},
    capture_output=True,
    check=False,
  )


def test_text_is_kept_under_any_locale(tmp_path):
  program = f"""
import pathlib
from jaxsparse.data import generated
from jaxsparse.run import workdir
path = pathlib.Path({str(tmp_path)!r}) / 'text'
generated.write_whole(path, '\\u65e5\\u672c')
for _ in range(2):
  workdir.append_sample({str(tmp_path)!r}, dict(text='\\u65e5\\u672c'))
"""
  done = run(program, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
  assert done.returncode == 0, done.stderr.decode()
  lines = (tmp_path / workdir.SAMPLES).read_text('utf-8').splitlines()
  assert [json.loads(line) for line in lines] == [dict(text='日本')] * 2
  assert (tmp_path / 'text').read_text('utf-8') == '日本'


def test_a_closed_pipe_ends_no_run():
  program = """
import os, sys
reading, writing = os.pipe()
os.dup2(writing, 1)
os.close(writing)
os.close(reading)
from jaxsparse.run.progress import Reporter
reporter = Reporter()
reporter.say('nobody reads')
with reporter.steps(0, 2, 'training'):
  reporter.show(1, 2, {}, is_logged=True)
print('nor this')
print('reached the end', file=sys.stderr)
"""
  done = run(program)
  assert done.returncode == 0
  assert done.stderr == b'reached the end\n'


def test_a_terminal_that_is_gone_ends_no_run():
  program = """
import os, pty, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
controller, terminal = pty.openpty()
os.dup2(terminal, 1)
os.close(terminal)
from jaxsparse.run.progress import Reporter
reporter = Reporter()
with reporter.steps(0, 2, 'training'):
  os.close(controller)
  reporter.say('nobody reads')
  reporter.show(1, 2, {}, is_logged=True)
print('reached the end', file=sys.stderr)
"""
  done = run(program, TERM='xterm')
  assert done.returncode == 0, done.stderr.decode()
  assert done.stderr.endswith(b'reached the end\n')
