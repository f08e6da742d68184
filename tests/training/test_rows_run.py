# SPDX-License-Identifier: Apache-2.0
"""A run of rows ranks them once, goes on with them, and leaves a delta."""

import dataclasses
import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference.small_run import save_untrained
from small_model import Batches, make_batch, make_mesh

from jaxsparse import config as c
from jaxsparse.config import saved_config
from jaxsparse.config.errors import UserError
from jaxsparse.data.pieces import Corpus, Piece
from jaxsparse.data.tokenizer import ByteTokenizer
from jaxsparse.inference import adapters as loaded_adapters
from jaxsparse.nn import row_deltas
from jaxsparse.run import adapter_files, checkpoint, mapped_tables, start
from jaxsparse.run.progress import Reporter
from jaxsparse.training import (
  evaluation,
  loop,
  ranked_texts,
  resume,
  start_from,
  trained_rows,
)

MODEL = c.ModelConfig(
  num_layers=1, model_dim=8, num_heads=1, num_kv_heads=1, head_dim=8,
  mlp_dim=8, vocab_size=257,
  memory=c.MemoryConfig.peer(
    num_keys=6, key_dim=4, num_heads=1, num_selected=4, value_dim=8,
    pre_value_dim=8, placements=((0, 0),),
  ),
)  # fmt: skip
ADAPTER = c.AdapterConfig(kind='rows', num_rows=5, ranking_unit=8)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  return save_untrained(tmp_path_factory.mktemp('base'), MODEL, 0.3)


def of(base, model=MODEL, **fields):
  return c.Config(
    model=model,
    data=c.DataConfig(batch_size=2, seq_len=16),
    optimizer=c.OptimizerConfig(warmup_steps=1),
    adapter=dataclasses.replace(ADAPTER, **fields),
    train=c.TrainConfig(
      num_steps=4, save_every=2, log_every=1, start_from=str(base)
    ),
  )


def train_step(config, state, batch, frozen):
  """One that takes no time, and tells one batch and one order from others."""
  by = jnp.mean(batch['tokens'].astype(jnp.float32)) / 100
  params = jax.tree.map(lambda x: 0.9 * x + by, state.params)
  state = dataclasses.replace(state, step=state.step + 1, params=params)
  return state, dict(loss=by, grad_norm=by)


def texts(new=range(3), background=range(10, 16)):
  def passed(seeds):
    return lambda: [
      {name: x[:2] for name, x in make_batch(seed).items()} for seed in seeds
    ]

  return trained_rows.Texts(passed(new), passed(background))


def no_texts():
  def passed():
    raise AssertionError('the rows are ranked already')

  return trained_rows.Texts(passed, passed)


@pytest.fixture
def fit(monkeypatch):
  monkeypatch.setattr(loop, 'train_step', train_step)
  monkeypatch.setattr(
    evaluation, 'validate', lambda *_, **__: evaluation.Validation(1, 1, {})
  )

  def run(config, workdir, ranked_by=None):
    config, _ = resume.open_workdir(config, workdir)
    config = start_from.begin(config, workdir, lambda _: None)
    resume.save_config(config, workdir)
    data = loop.TrainingData(Batches(), list, 1, 1.0, ranked_by=ranked_by)
    read = functools.partial(loaded_adapters.load_base, config)
    with jax.set_mesh(make_mesh((1, 1, 1))):
      return loop.fit(config, workdir, data, Reporter(), lambda _: None, read)

  return run


def rows_of(workdir):
  tensors, _ = adapter_files.read(adapter_files.folder_of(workdir, 'adapter'))
  return tensors


def begun_with(workdir):
  """What reads the tables of a run that begins there."""
  return start_from.given_tables(start.checkpoint_of(str(workdir))).rows


def lora_beside(base, folder):
  """`begun_with` of a run of LoRA, whose base's tables are as they were."""
  config = of(base)
  config.adapter = c.AdapterConfig(kind='lora')
  begun_from = dataclasses.asdict(start.checkpoint_of(str(base)))
  record = dict(config=saved_config.to_json(config), start=begun_from)
  (folder / 'lora').mkdir()
  arrays = {'block_00': {'attention': {'query': {'a': np.zeros(2)}}}}
  checkpoint.save_params(folder / 'lora', arrays, record)
  return begun_with(folder / 'lora')


def test_it_ranks_once_and_goes_on_exactly(base, tmp_path, fit, capsys):
  workdir, config = tmp_path / 'new', of(base)
  fit(config, workdir, texts())
  said = capsys.readouterr().out
  assert '5 rows of block_00/memory: ' in said
  assert '80 parameters are trained, in 10 rows of tables' in said
  whole = rows_of(workdir)
  path = 'block_00/memory/value_table'
  assert len(whole[f'{path}/rows']) == 5
  assert whole[f'{path}/values'].any()
  shutil.rmtree(workdir / 'checkpoints' / '4')
  shutil.rmtree(workdir / 'adapters')
  fit(config, workdir, no_texts())
  assert 'Going on from the checkpoint of step 2' in capsys.readouterr().out
  jax.tree.map(np.testing.assert_array_equal, rows_of(workdir), whole)
  # All that reads a workdir reads the base with its rows.
  _, params = loaded_adapters.load_params(workdir)
  before = row_deltas.tables(checkpoint.load_params(base)[1])[path]
  expected = np.array(before)
  expected[whole[f'{path}/rows']] += whole[f'{path}/values']
  assert np.array_equal(row_deltas.tables(params)[path], expected)
  _, mapped = loaded_adapters.load_params(workdir, tables='file')
  table = row_deltas.tables(mapped)[path]
  assert np.array_equal(table.rows, whole[f'{path}/rows'])
  # So does a run that has its tables on file.
  for read, table in (
    (begun_with(workdir), expected),
    (lora_beside(base, tmp_path), before),
  ):
    assert np.array_equal(read[path](), table)
  _, rest = loaded_adapters.load_params(workdir, tables=mapped_tables.NONE)
  assert 'block_00' in rest
  # Without what was ranked it is ranked anew, by another text otherwise.
  shutil.rmtree(workdir / 'checkpoints' / '4')
  shutil.rmtree(workdir / trained_rows.FOLDER)
  with pytest.raises(UserError, match='is of other rows than those'):
    fit(config, workdir, texts(new=range(30, 33)))


@pytest.mark.slow
def test_a_run_of_all_parameters_begins_with_its_base_and_rows(
  base, tmp_path, fit, capsys
):
  fit(of(base), tmp_path / 'rows', texts())
  after = dataclasses.replace(of(tmp_path / 'rows'), adapter=c.AdapterConfig())
  capsys.readouterr()
  fit(after, tmp_path / 'all')
  # It is compared at the end with what it began with, rows and all.
  said = capsys.readouterr().out
  assert 'rows of tables moved is not known' not in said
  assert 'block_00/memory/rows_moved' in said
  # On several devices it begins with the same.
  read = functools.partial(loaded_adapters.load_base, after)
  args = after, start.source(after), print, read
  one, several = (make_mesh(shape) for shape in ((1, 1, 1), (2, 2, 1)))
  with jax.set_mesh(one):
    expected = start_from.load_params(*args)
  with jax.set_mesh(several):
    found = start_from.load_params(*args)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_several_adapters_are_added_and_overlaps_are_said(base, tmp_path, fit):
  workdir, said = tmp_path / 'new', []
  fit(of(base), workdir, texts())
  folder = adapter_files.folder_of(workdir, 'adapter')
  tensors, meta = adapter_files.read(folder)
  path = 'block_00/memory/value_table'
  other = tensors | {f'{path}/values': 3 * tensors[f'{path}/values']}
  adapter_files.write(tmp_path / 'other', other, meta)
  before = np.array(row_deltas.tables(checkpoint.load_params(base)[1])[path])
  _, params = loaded_adapters.load_params(base)
  folders = [folder, tmp_path / 'other']
  params = loaded_adapters.applied(
    MODEL, params, folders, meta['base'], say=said.append
  )
  before[tensors[f'{path}/rows']] += 4 * tensors[f'{path}/values']
  found = row_deltas.tables(params)[path]
  np.testing.assert_allclose(found, before, rtol=1e-6)
  assert any(f'5 rows of {path} are changed by several' in x for x in said)
  with pytest.raises(UserError, match='was trained beside other parameters'):
    loaded_adapters.applied(MODEL, params, [folder], 'another')
  with pytest.raises(UserError, match='differences would be added twice'):
    loaded_adapters.applied(MODEL, params, [folder, folder], meta['base'])


def test_what_ranks_no_row_is_refused(base, tmp_path, fit):
  def one_document():
    # All of the background's documents read all rows of the text.
    return [{k: np.repeat(x[:1], 2, 0) for k, x in make_batch(0).items()}]

  with pytest.raises(UserError, match="'tfidf' finds no row"):
    fit(
      of(base, ranking_unit=16),
      tmp_path,
      trained_rows.Texts(one_document, one_document),
    )
  with pytest.raises(UserError, match='needs a base with memory layers'):
    trained_rows.with_rows(
      of(base, dataclasses.replace(MODEL, memory=None)), tmp_path, {}, None,
      None, Reporter(),
    )  # fmt: skip


def test_the_background_is_what_the_base_knows(base):
  def piece(text):
    return Piece(text.encode(), True)

  def corpus(letter, **fields):
    pieces = [piece(letter * 31) for _ in range(8)]
    return Corpus(
      key=letter, directory=pathlib.Path(), train=pieces, validation=[],
      test=None, validation_bytes=0, **fields,
    )  # fmt: skip

  tokens, config = ByteTokenizer(), of(base)
  known = corpus('b')
  ranked_by = ranked_texts.of_run(config, corpus('a', before=known), tokens)
  for passed, letter in ((ranked_by.new, 'a'), (ranked_by.background, 'b')):
    first, *_ = passed()
    words = first['tokens'][first['segment_ids'] > 0]
    assert set(words) - {tokens.begin_id} == {ord(letter)}
  with pytest.raises(UserError, match='against a text that the base knows'):
    ranked_texts.of_run(config, corpus('a'), tokens).background()
  lora = dataclasses.replace(config, adapter=c.AdapterConfig(kind='lora'))
  assert ranked_texts.of_run(lora, corpus('a'), tokens) is None
