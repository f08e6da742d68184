# SPDX-License-Identifier: Apache-2.0
"""Metrics survive damage, full disks and boards that fail."""

import errno
import json
import os
import resource
import struct
import sys
import types

import pytest
from tensorboardX.proto.event_pb2 import Event

from jaxsparse.config import Config, TrainConfig
from jaxsparse.config.errors import UserError
from jaxsparse.run import boards, metrics
from jaxsparse.run.metrics import MetricsWriter, read_rows

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def said():
  return []


@pytest.fixture
def write(tmp_path, said):
  """(first step, last step) -> the rows between are written, in one start."""

  def call(first, last, config=None):
    config = config or Config()
    writer = MetricsWriter(config, tmp_path, first, said.append)
    for step in range(first + 1, last + 1):
      writer.write(step, {'loss': 1 / step})
    writer.sync()
    writer.close()

  return call


def steps(folder, name='metrics.jsonl'):
  lines = (folder / name).read_text().splitlines()
  return [json.loads(line)['step'] for line in lines]


def events(folder):
  """Steps and values that TensorBoard reads, and where starts begin."""
  found = []
  for path in sorted((folder / 'tensorboard').iterdir()):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack('Q', content[:8])
      event = Event.FromString(content[12 : 12 + length])
      found += [(event.step, v.tag) for v in event.summary.value]
      if event.HasField('session_log'):
        found.append((event.step, 'start'))
      content = content[16 + length :]
  return found


def test_a_start_forgets_what_it_repeats(write, tmp_path, said):
  write(0, 5)
  write(3, 6)
  assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
  assert [row['step'] for row in read_rows(tmp_path)] == [1, 2, 3, 4, 5, 6]
  assert said == []
  names = [(i, 'loss') for i in range(1, 6)]
  assert events(tmp_path) == [
    (1, 'start'), *names, (4, 'start'), *names[3:], (6, 'loss'),
  ]  # fmt: skip


DAMAGED = {
  'no UTF-8': b'{"step": 2, "loss": 0.\xff}',
  'half a character': '{"step": 2, "é'.encode()[:-1],
  'a number': b'7',
  'a list': b'[1]',
  'no step': b'{"loss": 1.0}',
  'step of another type': b'{"step": "2"}',
  'true for a step': b'{"step": true}',
  'text for a loss': b'{"step": 2, "loss": "low"}',
  'a part': b'{"step": 2, "loss": {"a": 1}}',
  'more than a float': b'{"step": 2, "loss": 1' + b'0' * 400 + b'}',
  'more than an int': b'{"step": 1' + b'0' * 5000 + b'}',
  'zeros': bytes(40),
  'nested': b'[' * 100_000,
}


@pytest.mark.parametrize('name', DAMAGED)
def test_damaged_lines_are_left_out(name, write, tmp_path, said):
  good = [b'{"step": %d, "loss": 1.5}' % step for step in (1, 2, 3)]
  content = b'\n'.join([good[0], DAMAGED[name], *good[1:], b''])
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(content)
  assert [row['step'] for row in read_rows(tmp_path)] == [1, 2, 3]
  write(3, 4)
  assert steps(tmp_path) == [1, 2, 3, 4]
  # Nothing is lost: what could not be read may be of use to somebody.
  assert (tmp_path / 'metrics.1.jsonl').read_bytes() == content
  (sentence,) = said
  assert '1 lines' in sentence
  assert 'kept as metrics.1.jsonl' in sentence


@pytest.mark.parametrize('name', DAMAGED)
def test_a_torn_last_line_is_no_damage(name, write, tmp_path, said):
  content = b'{"step": 1}\n' + DAMAGED[name]
  (tmp_path / 'metrics.jsonl').write_bytes(content)
  write(1, 2)
  assert steps(tmp_path) == [1, 2]
  assert said == []


def test_metrics_without_a_checkpoint_are_set_aside(write, tmp_path, said):
  write(0, 3)
  write(0, 2)
  write(0, 1)
  assert steps(tmp_path) == [1]
  assert steps(tmp_path, 'metrics.1.jsonl') == [1, 2, 3]
  assert steps(tmp_path, 'metrics.2.jsonl') == [1, 2]
  assert 'the 3 rows of its metrics so far are kept as metrics.1' in said[0]
  assert len(said) == 2


def test_a_folder_in_its_place(write, tmp_path, said):
  (tmp_path / 'metrics.jsonl').mkdir()
  (tmp_path / 'metrics.jsonl' / 'x').touch()
  with pytest.raises(UserError, match=r"metrics\.jsonl' can't be read"):
    read_rows(tmp_path)
  write(0, 2)
  assert steps(tmp_path) == [1, 2]
  assert (tmp_path / 'metrics.1.jsonl' / 'x').exists()
  assert 'was a folder' in said[0]


class FullDisk:
  """A file on a disk that takes few bytes now and then, or none."""

  def __init__(self, file, room):
    self._file, self.room = file, room

  def write(self, content):
    if not self.room:
      raise FULL
    taken = self._file.write(content[: self.room])
    self.room -= taken
    return taken

  def __getattr__(self, name):
    return getattr(self._file, name)


def test_rows_wait_while_the_disk_is_full(tmp_path, said):
  writer = MetricsWriter(Config(), tmp_path, 0, said.append)
  writer.write(1, {'loss': 1.0})
  writer._file = disk = FullDisk(writer._file, 10)
  for step in (2, 3):
    writer.write(step, {'loss': 1.0})
    # No part of a row spoils the file.
    assert steps(tmp_path) == [1]
  disk.room = 1000
  writer.write(4, {'loss': 1.0})
  assert steps(tmp_path) == [1, 2, 3, 4]
  disk.room = 0
  writer.write(5, {'loss': 1.0})
  writer.close()
  assert len(said) == 2
  assert "metrics.jsonl can't be written (No space left on device)" in said[0]
  assert said[1] == '1 rows of metrics.jsonl could not be written.'


def test_a_limit_of_the_system(tmp_path, said):
  """Not only what a test pretends."""
  writer = MetricsWriter(Config(), tmp_path, 0, said.append)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    for step in range(1, 2001):
      writer.write(step, {'loss': 1 / 3})
    writer.sync()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert 0 < len(steps(tmp_path)) < 2000
  writer.close()
  assert steps(tmp_path) == list(range(1, 2001))
  assert len(said) == 2
  assert 'File too large' in said[0]
  assert any('TensorBoard gets no more rows' in sentence for sentence in said)


def test_a_board_that_fails_is_left_out(tmp_path, said, monkeypatch):
  def fail(self, step, scalars):
    raise FULL

  monkeypatch.setattr(boards.TensorBoard, 'write', fail)
  writer = MetricsWriter(Config(), tmp_path, 0, said.append)
  for step in (1, 2):
    writer.write(step, {'loss': 1.0})
  writer.close()
  assert steps(tmp_path) == [1, 2]
  assert len(said) == 1
  assert 'TensorBoard gets no more rows in this start ([Errno 28]' in said[0]


def test_a_file_in_the_place_of_tensorboard(write, tmp_path, said):
  (tmp_path / 'tensorboard').touch()
  write(0, 2)
  assert steps(tmp_path) == [1, 2]
  assert len(said) == 1
  assert 'TensorBoard gets no more rows' in said[0]


def test_an_object_store_out_of_reach(tmp_path, said, monkeypatch):
  writer = MetricsWriter(Config(), tmp_path, 0, said.append)

  def fail():
    raise ConnectionError('no route')

  monkeypatch.setattr(writer._files, 'sync', fail)
  writer.write(1, {'loss': 1.0})
  writer.sync()
  writer.close()
  assert len(said) == 1
  assert 'metrics wait until it can be' in said[0]


def test_rows_are_on_the_disk_when_a_checkpoint_is(tmp_path, monkeypatch):
  writer = MetricsWriter(Config(), tmp_path, 0)
  writer.write(1, {'loss': 1.0})
  synced = []
  monkeypatch.setattr(metrics.os, 'fsync', synced.append)
  writer.sync()
  assert writer._file.fileno() in synced
  writer.close()


class FakeWandB(types.ModuleType):
  """What `boards.WandB` uses of the package."""

  def __init__(self):
    super().__init__('wandb')
    self.__spec__ = types.SimpleNamespace()
    self.starts, self.rows, self.finished = [], [], 0

  Settings = dict

  def init(self, **kwargs):
    self.starts.append(kwargs)
    return self

  def log(self, scalars, step):
    self.rows.append((step, scalars))

  def finish(self):
    self.finished += 1


WANDB = Config(train=TrainConfig(wandb_project='mine'))


def test_weights_and_biases_goes_on_with_the_same_run(
  write, tmp_path, said, monkeypatch
):
  fake = FakeWandB()
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  write(0, 2)
  assert fake.starts == [], 'off by default'
  write(2, 3, WANDB)
  write(3, 4, WANDB)
  first, second = fake.starts
  assert first['id'] == second['id']
  assert first['project'] == 'mine'
  assert first['resume'] == 'allow'
  assert first['config']['train']['num_steps'] == 600
  assert fake.rows == [(3, {'loss': 1 / 3}), (4, {'loss': 1 / 4})]
  assert fake.finished == 2
  write(4, 5, Config(train=TrainConfig(wandb_project='other')))
  assert fake.starts[2]['id'] != first['id']
  assert said == []


def test_weights_and_biases_out_of_reach(write, tmp_path, said, monkeypatch):
  fake = FakeWandB()

  def init(**kwargs):
    raise ConnectionError('timed out\nTraceback of theirs')

  fake.init = init
  monkeypatch.setitem(sys.modules, 'wandb', fake)
  write(0, 2, WANDB)
  assert steps(tmp_path) == [1, 2]
  (sentence,) = said
  assert sentence.startswith('Weights & Biases gets no more rows')
  assert '(timed out)' in sentence


def test_weights_and_biases_not_installed(tmp_path, monkeypatch):
  monkeypatch.setattr(boards.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r'jaxsparse\[wandb\]'):
    MetricsWriter(WANDB, tmp_path, 0)


def test_old_names_are_read(tmp_path):
  old = {
    'step': 3,
    'loss': 2.0,
    'block_price': 0.5,
    'block_01/block_price': 1,
    'block_01/memory/slots_used': 0.5,
    'block_01/memory/unevenness': 1.5,
    'block_01/moe/experts_used': 0.75,
    'block_01/moe/load_max': 2.5,
  }
  (tmp_path / 'metrics.jsonl').write_text(json.dumps(old) + '\n')
  assert metrics.read_rows(tmp_path) == [
    {
      'step': 3,
      'loss': 2.0,
      'sparsity_loss': 0.5,
      'block_01/sparsity_loss': 1,
      'block_01/memory/usage_fraction': 0.5,
      'block_01/memory/usage_kl': 1.5,
      'block_01/moe/usage_fraction': 0.75,
      'block_01/moe/usage_max': 2.5,
    }
  ]
