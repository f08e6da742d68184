# SPDX-License-Identifier: Apache-2.0
"""The guide's client runs, and the flags that it and its files name exist."""

import io
import re
import shlex
from contextlib import redirect_stdout

from documents import DOCS, PAGES, blocks

from jaxsparse.serving import command

GUIDE = 'docs/guides/serving.md'
EXAMPLES = DOCS / 'examples'


def flags_of(line):
  return command.parse_arguments(shlex.split(line)[1:])


def test_the_client_of_the_guide_runs(server):
  (block,) = blocks(GUIDE, 'py')
  said = io.StringIO()
  with redirect_stdout(said):
    exec(block.replace('http://127.0.0.1:8080', server.url), {})
  assert said.getvalue().startswith('def def def def def  20\n')


def test_flags_of_the_guide_are_there():
  page = PAGES[GUIDE]
  for line in re.findall(r'^model-server .*', page, re.MULTILINE):
    assert flags_of(line).port == 8080
  known = vars(flags_of('model-server --model-path=x'))
  named = set(re.findall(r'`--([a-z-]+)', page))
  assert {'host', 'slots', 'drain-seconds', 'history-blocks'} <= named
  for flag in named - {'help'}:
    assert flag.replace('-', '_') in known, flag


def test_files_beside_the_guide_start_it():
  unit = (EXAMPLES / 'model_server.service').read_text()
  (line,) = re.findall(r'^ExecStart=(.*)', unit, re.MULTILINE)
  (stop,) = re.findall(r'^TimeoutStopSec=(\d+)', unit, re.MULTILINE)
  # systemd kills what has not ended by then.
  assert int(stop) > flags_of(line).drain_seconds
  assert command.KEY_VARIABLE in unit
  image = (EXAMPLES / 'model_server.Dockerfile').read_text()
  (entry,) = re.findall(r'^ENTRYPOINT (\[.*\])', image, re.MULTILINE)
  assert flags_of(shlex.join(eval(entry))).host == '0.0.0.0'
  nginx = (EXAMPLES / 'model_server.nginx').read_text()
  default = flags_of('model-server --model-path=x')
  assert f'client_max_body_size {command.BODY_MIB}m;' in nginx
  assert f'proxy_read_timeout {default.request_seconds:g}s;' in nginx
  assert 'proxy_buffering off;' in nginx
