# SPDX-License-Identifier: Apache-2.0
"""Files of a workdir: whole or not at all, and never where a link leads."""

import errno
import json
import os
import pathlib

import pytest

from jaxsparse.config import Config, TrainConfig, saved_config
from jaxsparse.config.errors import UserError
from jaxsparse.evaluation import store
from jaxsparse.run import new_workdir, run_config, workdir

CONFIG = Config(train=TrainConfig(num_steps=77))
TEXT = saved_config.to_json(CONFIG).encode()

DAMAGES = {
  'empty': b'',
  'cut': TEXT[: len(TEXT) // 2],
  'zeros': bytes(len(TEXT)),
  'no UTF-8': b'\xff' + TEXT,
  'a number': b'7\n',
  'nested': b'[' * 100_000,
  'a folder': None,
  'missing': ...,
}


def damage(folder, content):
  path = folder / 'config.json'
  path.unlink(missing_ok=True)
  if content is None:
    path.mkdir()
  elif content is not ...:
    path.write_bytes(content)


def test_a_published_checkpoint_is_no_workdir(tmp_path):
  (tmp_path / 'config.json').write_text('{"model_type": "llama"}')
  with pytest.raises(UserError, match='by jaxsparse convert from-hf FOLDER'):
    run_config.read(tmp_path)


@pytest.mark.parametrize('name', DAMAGES)
def test_a_damaged_config_is_taken_from_a_checkpoint(
  name, tmp_path, monkeypatch
):
  damage(tmp_path, DAMAGES[name])
  record = dict(config=TEXT.decode())
  monkeypatch.setattr(run_config.checkpoint, 'read_record', lambda w: record)
  (tmp_path / 'checkpoints').mkdir()
  before = sorted(tmp_path.rglob('*'))
  said = []
  assert run_config.read(tmp_path, said.append) == CONFIG
  assert len(said) == 1
  assert 'config.json' in said[0]
  # Reading writes nothing.
  assert sorted(tmp_path.rglob('*')) == before


@pytest.mark.parametrize('name', DAMAGES)
@pytest.mark.parametrize('record', [None, {'data': {}}])
def test_without_a_copy_a_sentence_says_what_helps(
  name, record, tmp_path, monkeypatch
):
  damage(tmp_path, DAMAGES[name])
  (tmp_path / 'checkpoints').mkdir()
  monkeypatch.setattr(run_config.checkpoint, 'read_record', lambda w: record)
  with pytest.raises(UserError, match=r'config\.json.* own recipe'):
    run_config.read(tmp_path)


@pytest.mark.parametrize(
  'fields',
  [
    {'color': 'green'},
    {'train': {'num_steps': 4.5}},
    {'train': {'num_steps': '4'}},
    {'model': {'num_layers': -1}},
    {'model': 7},
  ],
)
def test_a_config_that_does_not_fit(fields, tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(fields))
  with pytest.raises(UserError):
    run_config.read(tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path = tmp_path / 'file'
  workdir.write_whole(path, b'old')

  def full(descriptor):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  with pytest.raises(OSError, match='No space'):
    workdir.write_whole(path, b'new')
  assert path.read_bytes() == b'old'
  assert list(tmp_path.iterdir()) == [path]


def test_a_file_and_its_folder_are_brought_to_the_disk(tmp_path, monkeypatch):
  synced = []

  def sync(descriptor):
    synced.append(str(pathlib.Path(f'/proc/self/fd/{descriptor}').readlink()))

  monkeypatch.setattr(os, 'fsync', sync)
  workdir.write_whole(tmp_path / 'file', b'content')
  assert synced[0].startswith(str(tmp_path / 'file'))
  assert synced[1:] == [str(tmp_path)]


def test_links_are_not_followed(tmp_path):
  victim = tmp_path / 'victim'
  victim.write_bytes(b'mine')
  run = tmp_path / 'run'
  run.mkdir()
  for name in ('samples.jsonl', 'file', 'plots'):
    (run / name).symlink_to(victim)
  with pytest.raises(UserError, match='symbolic'):
    workdir.append_sample(run, {'text': 'x'})
  workdir.write_whole(run / 'file', b'new')
  with pytest.raises(UserError, match='a file or a link'):
    workdir.make_folder(run / 'plots')
  assert victim.read_bytes() == b'mine'


@pytest.mark.parametrize(
  ('make', 'sentence'),
  [
    (lambda x: workdir.make_folder(x / 'a'), '^workdir .*another --workdir or'),
    (
      lambda x: workdir.make_folder(x / 'a', '--out'),
      '^out .*/a.*another --out',
    ),
    (lambda x: new_workdir.require_new(x / 'a', '--out'), 'another --out or'),
    (lambda x: store.folder_of('run', str(x)), '^output .*another --output or'),
  ],
)
def test_the_flag_that_named_a_folder_is_told(make, sentence):
  with pytest.raises(UserError, match=sentence):
    make(pathlib.Path('/proc/nothing'))


def test_a_sample_begins_a_line(tmp_path):
  (tmp_path / 'samples.jsonl').write_bytes(b'{"text": "cut')
  workdir.append_sample(tmp_path, {'text': 'ἕν\udc80'})
  workdir.append_sample(tmp_path, {'text': 'two'})
  lines = (tmp_path / 'samples.jsonl').read_text('utf-8').splitlines()
  assert [json.loads(line)['text'] for line in lines[1:]] == ['ἕν\udc80', 'two']


def test_home(monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  assert workdir.expanded('~/run') == '/home/me/run'
  for path in ('run', '/a/~b', 'gs://b/~c', ''):
    assert workdir.expanded(path) == path
  with pytest.raises(UserError, match='home folder'):
    workdir.expanded('~nobody-has-this-name/run')
