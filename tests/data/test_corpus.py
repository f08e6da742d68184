# SPDX-License-Identifier: Apache-2.0
"""Corpora built once, whole or not at all."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from jaxsparse.config import DataConfig
from jaxsparse.config.errors import UserError
from jaxsparse.data import builder, compression, documents, percent, splits
from jaxsparse.data.corpus import build_corpus


@pytest.fixture
def books(tmp_path):
  """Thirty files of text."""
  folder = tmp_path / 'books'
  folder.mkdir()
  for i in range(30):
    (folder / f'{i}.txt').write_text(f'Žluťoučký kůň no. {i} 🐎.\n' * (300 + i))
  return folder


@pytest.fixture
def config(books, tmp_path):
  return DataConfig(
    text=f'{books}/*.txt', cache_dir=str(tmp_path / 'cache'),
    validation_fraction=0.1, test_fraction=0.1,
  )  # fmt: skip


def _text(pieces) -> bytes:
  return b''.join(piece.text for piece in pieces)


def test_every_file_is_in_one_split_in_pieces(config, books):
  corpus = build_corpus(config, lambda line: None)
  stored = {
    name: _text(getattr(corpus, name))
    for name in ('train', 'validation', 'test')
  }
  for path in books.iterdir():
    assert sum(path.read_bytes() in text for text in stored.values()) == 1
  assert sum(map(len, stored.values())) == sum(
    path.stat().st_size for path in books.iterdir()
  )
  assert corpus.validation_bytes == len(stored['validation'])
  ends = sum(
    p.ends_document for x in (corpus.train, corpus.validation) for p in x
  )
  assert ends + sum(p.ends_document for p in corpus.test) == 30
  assert len(corpus.train) > 30


def test_it_is_built_once_and_again_when_content_changes(config, books):
  said = []
  first = build_corpus(config, said.append)
  again = build_corpus(config, said.append)
  assert len(said) == 1
  assert first.key == again.key
  content = (books / '3.txt').read_bytes()
  # The same size, as a cache by size and time could miss it.
  (books / '3.txt').write_bytes(content.replace(b'no.', b'No.'))
  changed = build_corpus(config, said.append)
  assert len(said) == 2
  assert changed.key != first.key


def test_shares_of_bytes_are_exact(config):
  config.split = 'bytes'
  corpus = build_corpus(config, lambda line: None)
  splits = [corpus.train, corpus.validation, corpus.test]
  sizes = [len(_text(split)) for split in splits]
  total = sum(sizes)
  wanted = [total - 2 * round(0.1 * total), *[round(0.1 * total)] * 2]
  # A cut moves back to the start of a character, by 3 bytes at most.
  assert sizes == pytest.approx(wanted, abs=3)
  ends = [piece.ends_document for split in splits for piece in split]
  # A document that goes on in the next split does not end twice.
  assert sum(ends) == 30


def _config(tmp_path, text, **fields) -> DataConfig:
  return DataConfig(
    text=str(tmp_path / text), cache_dir=str(tmp_path / 'cache'), **fields
  )


@pytest.mark.parametrize('others', [0, 3])
def test_one_file_is_split_by_bytes_and_that_is_said(tmp_path, others):
  """By itself or beside others that hold next to nothing."""
  (tmp_path / 'in').mkdir()
  text = 'To be, or not to be.\n' * 5000
  (tmp_path / 'in' / 'all.txt').write_text(text)
  for i in range(others):
    (tmp_path / 'in' / f'{i}.txt').write_text('Yes.\n')
  said = []
  corpus = build_corpus(_config(tmp_path, 'in'), said.append)
  assert corpus.validation_bytes == pytest.approx(0.05 * len(text), abs=20)
  assert "last part does, as with data.split='bytes'" in said[0]
  explicit = _config(tmp_path, 'in', split='bytes')
  said.clear()
  assert build_corpus(explicit, said.append).key == corpus.key
  assert not said


def test_a_corpus_is_the_same_as_before_there_was_auto(config):
  """A golden key: runs of former versions go on with their corpora."""
  config.text = config.text.replace('*', '1*')
  config.validation_fraction = 0.2
  key = build_corpus(config, lambda line: None).key
  assert key == '4a0edfb39de6bde76c4fdaa8'
  config.split = 'file'
  assert build_corpus(config, lambda line: None).key == key


def test_records_keep_apart_in_both_splits(tmp_path):
  path = tmp_path / 'a.jsonl.gz'
  texts = [f'Record no. {i}. ' * (1 + i % 7) for i in range(400)]
  path.write_bytes(
    gzip.compress(
      b'\n'.join(json.dumps({'t': text}).encode() for text in texts)
    )
  )
  said = []
  config = _config(tmp_path, 'a.jsonl.gz', text_field='t')
  corpus = build_corpus(config, said.append)
  stored = _text(corpus.train) + _text(corpus.validation)
  assert stored == ''.join(texts).encode()
  ends = [p.ends_document for x in (corpus.train, corpus.validation) for p in x]
  assert sum(ends) == 400
  # The same bytes are another text by another field.
  path.write_bytes(
    gzip.compress(
      b'\n'.join(json.dumps({'t': x, 'u': x}).encode() for x in texts)
    )
  )
  keys = {build_corpus(config, said.append).key}
  config.text_field = 'u'
  keys.add(build_corpus(config, said.append).key)
  assert len(keys) == 2
  config.text_field = 'v'
  with pytest.raises(UserError, match=r'no field .v.: .*\(t, u\)'):
    build_corpus(config, said.append)


def test_a_field_that_no_file_has_is_refused(config):
  config.text_field = 'body'
  with pytest.raises(UserError, match="text_field = 'body' is in no file"):
    build_corpus(config)
  with pytest.raises(UserError, match='text_field must name'):
    DataConfig(tfds='lm1b', text_field='body')
  with pytest.raises(UserError, match='text_field must name'):
    DataConfig(text='a.jsonl', text_field='')


def test_equal_documents_on_both_sides_are_counted(tmp_path):
  """At every start: it is the validation loss that they make too good."""
  lines = [f'Document no. {i}.' for i in range(100)]
  lines[97] = lines[3]
  lines[98] = lines[99] = lines[1] = lines[2] = 'Said again and again.'
  (tmp_path / 'a.jsonl').write_text(
    '\n'.join(json.dumps({'text': line}) for line in lines)
  )
  total = sum(map(len, lines))
  held_out = sum(map(len, lines[96:]))
  config = _config(tmp_path, 'a.jsonl', validation_fraction=held_out / total)
  equal = sum(map(len, lines[97:])) / held_out
  wanted = f'of validation that are in training too: 3 ({equal:.2%} of'
  for _ in range(2):
    said = []
    build_corpus(config, said.append)
    assert wanted in said[-1]
  # A corpus of a former version knows nothing of it.
  facts = build_corpus(config, said.append).directory / builder.MANIFEST
  num_bytes = json.loads(facts.read_text())['num_bytes']
  facts.write_text(json.dumps(dict(num_bytes=num_bytes)))
  said.clear()
  build_corpus(config, said.append)
  assert not [line for line in said if 'too:' in line]


def test_json_read_as_plain_text_is_said(tmp_path):
  (tmp_path / 'a.json').write_text(
    json.dumps([{'body': 'x' * 99}] * 30, indent=1)
  )
  for _ in range(2):
    said = []
    build_corpus(_config(tmp_path, 'a.json'), said.append)
    assert "punctuation: 'a.json'" in said[0]


def test_names_of_any_bytes_are_in_a_corpus(tmp_path):
  folder = tmp_path / os.fsdecode(b'caf\xe9')
  folder.mkdir()
  for i in range(20):
    (folder / os.fsdecode(b'%d\xff.txt' % i)).write_text('Text.\n' * 100)
  config = _config(tmp_path, folder.name)
  corpus = build_corpus(config, lambda line: None)
  assert corpus.validation_bytes == 600


def test_a_file_that_goes_away_is_no_fault_of_the_cache(tmp_path, monkeypatch):
  (tmp_path / 'a.txt').write_text('Text.\n' * 1000)
  _require = builder._require_space

  def remove(*args):
    (tmp_path / 'a.txt').unlink()
    _require(*args)

  monkeypatch.setattr(builder, '_require_space', remove)
  with pytest.raises(UserError, match=r"a.txt' cannot be read .No such file"):
    build_corpus(_config(tmp_path, 'a.txt'), lambda line: None)


def test_long_work_says_how_far_it_is(config, monkeypatch, capsys):
  monkeypatch.setattr(percent, 'SECONDS', 0)
  build_corpus(config)
  # All of it is heard, although TFDS is not.
  said = capsys.readouterr().out.splitlines()
  for doing in ('Hashing the text', 'Reading the text', 'Building the corpus'):
    shares = [
      int(line.rpartition(' ')[2].removesuffix('%'))
      for line in said
      if line.startswith(f'{doing}: ')
    ]
    assert shares == sorted(shares)
    assert len(set(shares)) > 20
    assert shares[-1] == 100


def test_a_killed_build_leaves_no_corpus(tmp_path):
  directory = tmp_path / 'corpora' / 'key'
  script = f"""
    import os, pathlib, signal
    from jaxsparse.data import builder, documents, splits

    class Deadly(documents.Document):
      def open(self):
        os.kill(os.getpid(), signal.SIGKILL)

    spans = [
      splits.Span(document=kind(name='x', content=b'x' * 10**6), start=0,
                  stop=10**6)
      for kind in (documents.Document, Deadly)
    ]
    builder.build(dict(train=spans, validation=spans),
                  pathlib.Path({str(directory)!r}), print)
  """
  code = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(script)], check=False
  ).returncode
  assert code == -signal.SIGKILL
  assert directory.with_suffix('.partial').exists()
  assert not builder.is_built(directory)
  document = documents.Document(name='x', content=b'y' * 9)
  span = splits.Span(document=document, start=0, stop=9)
  builder.build(dict(train=[span]), directory, print)
  sources, facts = builder.read(directory)
  assert _text(sources['train']) == b'y' * 9
  assert facts['num_bytes'] == dict(train=9)
  assert not directory.with_suffix('.partial').exists()


def test_two_processes_at_once_build_it_once(config):
  script = f"""
    from jaxsparse.config import DataConfig
    from jaxsparse.data.corpus import build_corpus
    config = DataConfig(text={config.text!r}, cache_dir={config.cache_dir!r})
    print(len(build_corpus(config).train))
  """
  runs = [
    subprocess.Popen(
      [sys.executable, '-c', textwrap.dedent(script)], stdout=subprocess.PIPE,
      text=True,
    )
    for _ in range(2)
  ]  # fmt: skip
  printed = [run.communicate()[0].splitlines() for run in runs]
  assert [run.returncode for run in runs] == [0, 0]
  assert printed[0][-1] == printed[1][-1]
  assert sum(map(len, printed)) == 3, 'one line by the one that builds'


def test_a_damaged_corpus_is_refused(config):
  corpus = build_corpus(config, lambda line: None)
  shutil.rmtree(corpus.directory / 'text_corpus')
  with pytest.raises(UserError, match='is damaged: remove'):
    build_corpus(config)


def test_a_cache_that_cannot_be_written_is_refused(config, tmp_path):
  (tmp_path / 'file').write_text('')
  config.cache_dir = str(tmp_path / 'file' / 'cache')
  with pytest.raises(UserError, match=r'cache_dir .* not writable'):
    build_corpus(config)
  for name in ('gs://bucket/cache', 'a\0b', 'caf\udce9', '~no-such-user/cache'):
    config.cache_dir = name
    with pytest.raises(UserError, match='must be a local directory'):
      build_corpus(config)


def test_a_full_disk_is_refused(config, monkeypatch):
  usage = shutil.disk_usage('/')
  monkeypatch.setattr(
    shutil, 'disk_usage', lambda path: usage._replace(free=1000)
  )
  with pytest.raises(UserError, match='no disk space'):
    build_corpus(config)


def test_a_disk_that_fills_up_is_named(config, monkeypatch):
  def fill(self, *args, **kwargs):
    raise RuntimeError('write() failed: No space left on device; at byte 7')

  monkeypatch.setattr(builder.TextCorpus, 'download_and_prepare', fill)
  with pytest.raises(UserError, match=r'no disk space .* is full'):
    build_corpus(config, lambda line: None)


def test_compressors_are_measured_once(config):
  corpus = build_corpus(config, lambda line: None)
  figures = compression.bits_per_byte(corpus)
  # Thirty lines that repeat: far below the 8 bits of noise.
  assert 0 < figures['gzip'] < 0.5
  assert 0 < figures['xz'] < 0.5
  assert compression.bits_per_byte(corpus) == figures
  cache = corpus.directory / 'compression.json'
  assert json.loads(cache.read_text()) == figures
