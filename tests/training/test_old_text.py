# SPDX-License-Identifier: Apache-2.0
"""What a model knew before is found, measured, and told beside the new text."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import make_mesh

from jaxsparse.config import (
  AdapterConfig,
  Config,
  DataConfig,
  ModelConfig,
  TrainConfig,
)
from jaxsparse.data.corpus import build_corpus
from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.run import checkpoint, command_line, new_workdir
from jaxsparse.run.progress import Reporter
from jaxsparse.training import (
  evaluation,
  first_state,
  inputs,
  loop,
  old_text,
  resume,
  rows_moved,
)

BYTES = ByteTokenizer()


def quiet(_):
  pass


@pytest.fixture
def texts(tmp_path):
  """Configs of an old text and of a new one."""
  for name in ('old', 'new'):
    (tmp_path / f'{name}.txt').write_text(f'{name} text\n' * 2000)
  return tuple(
    DataConfig(
      text=str(tmp_path / f'{name}.txt'), cache_dir=str(tmp_path / 'cache')
    )
    for name in ('old', 'new')
  )


def trained_on(data: DataConfig, folder, key=None):
  """A workdir that says that it was trained on a text."""
  folder.mkdir()
  record = {'data': {'corpus': key or build_corpus(data, quiet).key}}
  checkpoint.save_params(folder, {'w': np.zeros(2, np.float32)}, record)
  resume.save_config(Config(data=data), folder)
  return folder


def run_from(folder, data: DataConfig) -> Config:
  return Config(data=data, train=TrainConfig(start_from=str(folder)))


def found(config, workdir, say=quiet):
  workdir.mkdir(exist_ok=True)
  corpus = build_corpus(config.data, quiet)
  return old_text.beside(config, corpus, BYTES, workdir, say).before


def test_the_text_of_the_run_that_came_before_is_measured(texts, tmp_path):
  old, new = texts
  folder = trained_on(old, tmp_path / 'run')
  before = found(run_from(folder, new), tmp_path / 'next')
  assert before.key == build_corpus(old, quiet).key
  # More of the same text forgets nothing.
  assert found(run_from(folder, old), tmp_path / 'more') is None
  # What is replayed is what counts.
  (tmp_path / 'third.txt').write_text('third text\n' * 2000)
  named = dataclasses.replace(new, replay=str(tmp_path / 'third.txt'))
  replayed = found(run_from(folder, named), tmp_path / 'replays')
  assert b'third' in replayed.validation[0].text
  assert found(Config(data=new), tmp_path / 'anew') is None


def test_no_more_of_it_is_measured_than_asked_for(texts, tmp_path):
  """Evenly, so that a short run is not all validation; 0 leaves it out."""
  old, new = texts
  lines = ''.join(f'{i:099d}\n' for i in range(10_000))
  (tmp_path / 'old.txt').write_text(lines)
  old = dataclasses.replace(old, validation_fraction=0.5)
  folder = trained_on(old, tmp_path / 'run')
  heard = []

  def measured(num_bytes, **fields):
    config = run_from(folder, new)
    config = dataclasses.replace(config, **fields)
    config.train.old_text_bytes = num_bytes
    return found(config, tmp_path / f'{num_bytes}', heard.append)

  whole = measured(2**20)
  assert not [x for x in heard if 'train.old_text_bytes' in x]
  part = measured(50_000)
  assert 'bytes are measured (train.old_text_bytes).' in heard[-1]
  assert part.validation_bytes == sum(len(x.text) for x in part.validation)
  assert 50_000 <= part.validation_bytes < 60_000
  places = [list(whole.validation).index(x) for x in part.validation]
  steps = np.diff([*places, len(whole.validation)])
  assert set(steps) <= {8, 9}
  assert places[0] == 0
  assert len(part.train) == len(whole.train)
  assert measured(0) is None
  # Which text it is, rows are ranked by all the same.
  rows = measured(0, adapter=AdapterConfig(kind='rows'))
  assert (rows.validation_bytes, len(rows.train)) == (0, len(whole.train))
  corpus = dataclasses.replace(build_corpus(new, quiet), before=rows)
  data = inputs.training_data(run_from(folder, new), corpus, BYTES)
  assert data.old_validation is None


def test_a_text_that_is_gone_or_unknown_is_told(texts, tmp_path):
  old, new = texts
  heard = []
  changed = trained_on(old, tmp_path / 'changed', key='another')
  assert found(run_from(changed, new), tmp_path / 'a', heard.append) is None
  gone = trained_on(
    dataclasses.replace(old, text=str(tmp_path / 'none.txt')),
    tmp_path / 'gone',
    key='x',
  )
  assert found(run_from(gone, new), tmp_path / 'b', heard.append) is None
  (tmp_path / 'import').mkdir()
  new_workdir.write(
    tmp_path / 'import', Config(), {'w': jnp.zeros(2)}, {'from': 'elsewhere'}
  )
  imported = run_from(tmp_path / 'import', new)
  assert found(imported, tmp_path / 'c', heard.append) is None
  ends = ('has changed.', 'names no file', 'name one by data.replay')
  told = [x for x in heard if x.startswith('What is forgotten')]
  for sentence, words in zip(told, ends, strict=True):
    assert words in sentence


def test_the_recipe_of_the_start_leaves_its_text_out(texts, tmp_path):
  old, new = texts
  named = dataclasses.replace(old, replay=new.text, replay_share=0.5)
  folder = trained_on(named, tmp_path / 'run')

  def parsed(*argv):
    flags = [f'--config.train.start_from={folder}', f'--workdir={tmp_path}/x']
    return command_line.parse_recipe('', [*argv, *flags])[0].data

  assert parsed() == named
  # Of two texts none could be meant.
  chats = parsed('--config.data.messages=chat.jsonl')
  assert (chats.messages, chats.text, chats.replay) == ('chat.jsonl', '', '')
  assert chats.cache_dir == old.cache_dir
  assert parsed(f'--config.data.text={new.text}') == new


def test_both_texts_are_measured_before_and_after(
  monkeypatch, tmp_path, capsys
):
  """Each step makes the model worse at the old text, and better at the new."""
  config = Config(
    model=ModelConfig(vocab_size=257),
    data=DataConfig(batch_size=2, seq_len=8),
    train=TrainConfig(num_steps=4, eval_every=2, log_every=1),
  )
  params = {'w': jnp.ones(1)}

  def train_step(config, state, batch, frozen):
    params = {'w': state.params['w'] + 1}
    state = dataclasses.replace(state, step=state.step + 1, params=params)
    return state, dict(loss=jnp.ones(()), grad_norm=jnp.ones(()))

  class Batches:
    def __next__(self):
      return {'tokens': np.zeros((2, 8), np.int32)}

    def get_state(self):
      return dict(lanes={})

    set_state = close = lambda *_: None

  monkeypatch.setattr(loop, 'train_step', train_step)
  monkeypatch.setattr(
    evaluation,
    '_evaluate',
    lambda config, params, batch: dict(
      nats=np.where(
        batch['is_old'][0] > 0, params['w'], 9 - params['w']
      ).item(),
      targets=1.0,
      slot_counts={},
    ),
  )

  def text(is_old):
    return lambda: iter([{'is_old': np.full(2, is_old, np.int32)}])

  monkeypatch.setattr(evaluation, 'to_global', lambda batch: batch)
  monkeypatch.setattr(
    first_state, 'init_parts', lambda config: (state_of(params), {})
  )
  data = loop.TrainingData(Batches(), text(0), 10, 1.0, text(1), 10)
  with jax.set_mesh(make_mesh((1, 1, 1))):
    loop.fit(config, tmp_path, data, Reporter(), lambda speed: None)
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  measured = [
    (r['step'], r['validation_loss'], r['old_validation_loss'])
    for r in rows
    if 'validation_loss' in r
  ]
  assert measured == [(0, 8, 1), (2, 6, 3), (4, 4, 5)]
  bits = [x / 10 / np.log(2) for x in (8, 4, 1, 5)]
  told = 'new text {:.4f} -> {:.4f}, old text {:.4f} -> {:.4f}'.format(*bits)
  assert told in capsys.readouterr().out


def state_of(params):
  return loop.TrainState(jnp.zeros((), jnp.int32), params, ())


def test_rows_that_moved_are_counted():
  before = jnp.array([[3.0, 4.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
  change = jnp.array([[0.0, 0.049], [0.0, 0.011], [0.0, 0.0], [1e-6, 0.0]])
  assert rows_moved.share(before, before + change) == 0.5
  assert rows_moved.share(before, before) == 0.0
