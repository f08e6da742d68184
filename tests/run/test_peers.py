# SPDX-License-Identifier: Apache-2.0
"""Processes that meet and end together, in small programs without JAX."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from jaxsparse.config.errors import UserError
from jaxsparse.run import peers

ROOT = pathlib.Path(__file__).parents[2]

PROGRAM = """
import sys, time
from jaxsparse.run import peers
from jaxsparse.config.errors import UserError

address, count, index, wait, then = sys.argv[1:]
try:
  peers.meet(address, int(count), int(index), float(wait))
except UserError as error:
  sys.exit(f'refused: {error}')
print('met', flush=True)
with peers.all_end_together():
  if then == 'fail':
    raise UserError('no room.')
  if then == 'crash':
    raise KeyError('x')
  time.sleep(0.3 if then == 'finish' else 30)
"""


@pytest.fixture
def address():
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return f'127.0.0.1:{probe.getsockname()[1]}'


@pytest.fixture
def start(address):
  """Starts a process of the run; what is left of all is ended."""
  with contextlib.ExitStack() as stack:

    def begin(index, count=3, wait=20, then='work'):
      process = subprocess.Popen(
        [sys.executable, '-c', PROGRAM, address]
        + [str(value) for value in (count, index, wait, then)],
        env=os.environ | {'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      stack.callback(process.kill)
      return process

    yield begin


def ends(*processes):
  """Exit code and stderr of each, within seconds."""
  found = []
  for process in processes:
    _, err = process.communicate(timeout=20)
    found.append((process.returncode, err))
  return found


@pytest.mark.parametrize('killed', [0, 1])
def test_a_killed_process_ends_the_others_who_name_it(start, killed):
  processes = [start(index) for index in range(3)]
  for process in processes:
    assert process.stdout.readline() == 'met\n'
  processes[killed].send_signal(signal.SIGKILL)
  begin = time.monotonic()
  others = [p for i, p in enumerate(processes) if i != killed]
  for code, err in ends(*others):
    assert code == 1
    assert f'error: process {killed} of 3 has ended without a word' in err
    assert 'Traceback' not in err
  assert time.monotonic() - begin < 5


@pytest.mark.parametrize('failing', [0, 2])
def test_the_sentence_of_one_ends_all(start, failing):
  processes = [
    start(index, then='fail' if index == failing else 'work')
    for index in range(3)
  ]
  for index, (code, err) in enumerate(ends(*processes)):
    assert code == 2
    name = '' if index == failing else f'process {failing} of 3: '
    assert err.endswith(f'\nerror: {name}no room.\n')


def test_a_defect_of_one_keeps_its_traceback_and_ends_all(start):
  first, second = start(0, 2, then='crash'), start(1, 2)
  (code, err), (other_code, other_err) = ends(first, second)
  assert code == other_code == 1
  assert 'Traceback' in err
  assert other_err.endswith("\nerror: process 0 of 2: KeyError: 'x'\n")


def test_all_finish(start):
  processes = [start(index, then='finish') for index in range(3)]
  for code, err in ends(*processes):
    assert code == 0
    assert 'error' not in err


def test_who_does_not_come_is_named(start):
  (code, err), (other_code, other_err) = ends(start(0, wait=2), start(2))
  assert code == other_code == 1
  for text in err, other_err:
    assert 'process 1 of 3 did not come within 2 seconds' in text


def test_nobody_at_the_address(address):
  with pytest.raises(UserError, match=r'process 0 of 2 did not answer .*0\.1'):
    peers.meet(address, 2, 1, 0.1)


def test_another_program_at_the_address(address):
  port = int(address.rpartition(':')[2])
  with socket.create_server(('127.0.0.1', port)) as server:

    def answer():
      with contextlib.suppress(OSError):
        while True:
          connection, _ = server.accept()
          connection.sendall(b'\x00\xff HTTP/1.1\n')
          connection.close()

    threading.Thread(target=answer, daemon=True).start()
    with pytest.raises(UserError, match='something else answers'):
      peers.meet(address, 2, 1, 0.5)
    server.shutdown(socket.SHUT_RDWR)


def test_a_port_in_use(address):
  port = int(address.rpartition(':')[2])
  with (
    socket.create_server(('', port)),
    pytest.raises(UserError, match=f"port {port} .* can't be used .*in use"),
  ):
    peers.meet(address, 2, 0, 1.0)


def test_what_does_not_fit_is_refused_and_the_others_still_meet(start):
  lead = start(0, then='finish')
  ((_, err),) = ends(start(1, count=2))
  assert '--num_processes=2 of process 1 must be that of process 0, 3' in err
  first = start(1, then='finish')
  time.sleep(0.5)
  twin = start(1, then='finish')
  # One of them waits, and the other is told at once.
  while first.poll() is None is twin.poll():
    time.sleep(0.02)
  refused, waiting = (first, twin) if first.poll() else (twin, first)
  assert '--process_id=1 is that of two processes' in ends(refused)[0][1]
  for code, _ in ends(lead, waiting, start(2, then='finish')):
    assert code == 0


def test_a_process_that_is_killed_and_started_again_while_all_wait(start):
  lead, killed = start(0, then='finish'), start(1)
  time.sleep(1)
  killed.kill()
  killed.wait()
  again, last = start(1, then='finish'), start(2, then='finish')
  for code, _ in ends(lead, again, last):
    assert code == 0


def test_the_relay_stays_open_when_the_lead_is_gone():
  with socket.create_server(('127.0.0.1', 0)) as server:
    relay = peers._relay('127.0.0.1', server.getsockname()[1])
    near = socket.create_connection(('127.0.0.1', relay))
    far, _ = server.accept()
    near.sendall(b'there')
    assert far.recv(9) == b'there'
    far.sendall(b'back')
    assert near.recv(9) == b'back'
  far.close()
  near.settimeout(0.3)
  with pytest.raises(TimeoutError):
    near.recv(1)


def test_the_relay_tells_the_lead_of_an_end():
  with socket.create_server(('127.0.0.1', 0)) as server:
    relay = peers._relay('127.0.0.1', server.getsockname()[1])
    near = socket.create_connection(('127.0.0.1', relay))
    far, _ = server.accept()
    near.close()
    assert far.recv(1) == b''
