"""Corpora built once, whole or not at all."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from jaxsparse.config import DataConfig
from jaxsparse.data import builder, compression, documents
from jaxsparse.data.corpus import build_corpus
from jaxsparse.errors import UserError


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


def test_a_killed_build_leaves_no_corpus(tmp_path):
  directory = tmp_path / 'corpora' / 'key'
  script = f"""
    import os, pathlib, signal
    from jaxsparse.data import builder, documents

    class Deadly(documents.Document):
      def open(self):
        os.kill(os.getpid(), signal.SIGKILL)

    spans = [
      documents.Span(document=kind(name='x', content=b'x' * 10**6), start=0,
                     stop=10**6, ends_document=True)
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
  span = documents.Span(
    document=documents.Document(name='x', content=b'y' * 9),
    start=0, stop=9, ends_document=True,
  )  # fmt: skip
  builder.build(dict(train=[span]), directory, print)
  sources, num_bytes = builder.read(directory)
  assert _text(sources['train']) == b'y' * 9
  assert num_bytes == dict(train=9)
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
  config.cache_dir = 'gs://bucket/cache'
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
