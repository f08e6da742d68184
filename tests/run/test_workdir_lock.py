# SPDX-License-Identifier: Apache-2.0
"""Two starts on one workdir: the second ends with a sentence."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest

from jaxsparse.config.errors import UserError
from jaxsparse.run import workdir_lock

# Holds the lock until it is killed, or ends at once with what it was told.
HOLDER = """
import sys, time
from jaxsparse.run import workdir_lock
from jaxsparse.config.errors import UserError
try:
  with workdir_lock.held(sys.argv[1]):
    print('held', flush=True)
    time.sleep(600)
except UserError as error:
  print(error, flush=True)
"""


def start(workdir):
  return subprocess.Popen(
    [sys.executable, '-c', HOLDER, str(workdir)],
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )


def enter(workdir, say=print):
  with workdir_lock.held(workdir, say):
    pass


def told(process):
  """The first line of a start, which is ended if it did not end itself."""
  try:
    return process.stdout.readline()
  finally:
    process.kill()
    process.wait()


def test_between_processes(tmp_path):
  holder = start(tmp_path)
  try:
    assert holder.stdout.readline() == 'held\n'
    words = rf'in use by process {holder.pid} on \S+ since 2\d\d\d-'
    with pytest.raises(UserError, match=words):
      enter(tmp_path)
  finally:
    holder.kill()
    holder.wait()
  # The system lets go of what a killed process held.
  with workdir_lock.held(tmp_path):
    # A refusal within this process does not let go of it.
    with pytest.raises(UserError, match=f'process {os.getpid()} '):
      enter(tmp_path)
    assert f'in use by process {os.getpid()} ' in told(start(tmp_path))
  with workdir_lock.held(tmp_path), workdir_lock.held(tmp_path / 'inner'):
    pass


def test_one_folder_by_two_names(tmp_path):
  (tmp_path / 'run').mkdir()
  (tmp_path / 'link').symlink_to(tmp_path / 'run')
  with (
    workdir_lock.held(tmp_path / 'run'),
    pytest.raises(UserError, match='in use'),
  ):
    enter(tmp_path / 'link')


@pytest.mark.parametrize(
  ('number', 'words'), [(errno.ENOLCK, 'knows no locks'), (errno.EAGAIN, None)]
)
def test_file_systems_without_locks(number, words, tmp_path, monkeypatch):
  def refuse(descriptor, how):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(fcntl, 'lockf', refuse)
  (tmp_path / 'run.lock').write_text(
    json.dumps(dict(host='a', pid=1, since=''))
  )
  said = []
  if words is None:
    with pytest.raises(UserError, match='process 1 on a'):
      enter(tmp_path, said.append)
  else:
    enter(tmp_path, said.append)
    assert len(said) == 1
    assert words in said[0]


def test_object_stores_say_that_they_know_no_locks():
  said = []
  enter('gs://bucket/run', said.append)
  assert 'knows no locks' in said[0]


def test_a_refused_lead_ends_all(tmp_path, monkeypatch):
  """All processes get what process 0 finds."""
  gathered = []
  monkeypatch.setattr(workdir_lock.hosts, 'is_process_zero', lambda: False)

  def gather(value):
    gathered.append(value)
    return ['workdir is in use', value]

  monkeypatch.setattr(workdir_lock.hosts, 'gather', gather)
  with pytest.raises(UserError, match='in use'):
    enter(tmp_path)
  assert gathered == ['']
  assert not list(tmp_path.iterdir())


def test_a_workdir_that_is_a_file(tmp_path):
  (tmp_path / 'file').touch()
  with pytest.raises(UserError, match="can't be written"):
    enter(tmp_path / 'file')
