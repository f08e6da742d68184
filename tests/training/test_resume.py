# SPDX-License-Identifier: Apache-2.0
"""Which changes of a config a workdir's run can go on with."""

import dataclasses
import pathlib
import typing

import jax
import numpy as np
import pytest

from jaxsparse.config import (
  Config,
  DataConfig,
  MemoryConfig,
  ModelConfig,
  MoEConfig,
  MultiModalConfig,
  OptimizerConfig,
  TableConfig,
  TrainConfig,
  VisionConfig,
)
from jaxsparse.config.errors import UserError
from jaxsparse.config.saved_config import to_json
from jaxsparse.data import tokenizer as tokenizer_lib
from jaxsparse.data.pieces import Corpus, Piece
from jaxsparse.nn.multimodal import MultiModalEncoder
from jaxsparse.run import field_meanings
from jaxsparse.training import resume
from jaxsparse.training.resume import (
  open_workdir,
  require_same_data,
  save_config,
)

CONFIG = Config(
  model=ModelConfig(memory=MemoryConfig(table=TableConfig(dtype='bfloat16'))),
  optimizer=OptimizerConfig(value_optimizer='row_adam'),
)
CORPUS = Corpus(
  key='key',
  directory=pathlib.Path(),
  train=[Piece(b'some text to learn merges from ' * 20, True)],
  validation=[Piece(b'text', True)],
  test=None,
  validation_bytes=4,
)


def changed(section, config=CONFIG, **fields):
  if section == 'table':
    table = dataclasses.replace(config.model.memory.table, **fields)
    section, fields = 'memory', dict(table=table)
  if section == 'memory':
    memory = dataclasses.replace(config.model.memory, **fields)
    section, fields = 'model', dict(memory=memory)
  inner = dataclasses.replace(getattr(config, section), **fields)
  return dataclasses.replace(config, **{section: inner})


@pytest.mark.parametrize(
  ('config', 'change'),
  [
    (changed('table', scheme='rows'), "scheme: 'auto' -> 'rows'"),
    (changed('table', gradient='deterministic'), 'table.gradient'),
    (changed('memory', init='release'), 'without effect'),
    (changed('model', use_remat=True), 'use_remat: False -> True'),
    (changed('model', query_chunk=64), 'query_chunk'),
    (changed('model', attention_implementation='xla'), 'implementation'),
    (changed('data', text='/other/disk/*.txt'), 'data.text'),
    (changed('data', num_lanes=16), 'data.num_lanes: 0 -> 16'),
    (changed('data', batch_size=32), 'nothing is read twice or left out'),
    (changed('train', log_every=1), 'train.log_every: 10 -> 1'),
    (changed('optimizer', value_row_budget=9), 'value_row_budget: 0 -> 9'),
    (changed('optimizer', value_lr_multiplier=2.0), 'value_lr_multiplier'),
    (changed('mesh', sparse=2), 'mesh.sparse: 1 -> 2'),
  ],
)
def test_accepted(config, change, tmp_path):
  save_config(CONFIG, tmp_path)
  _, (told,) = open_workdir(config, tmp_path)
  assert change in told


@pytest.mark.parametrize(
  ('config', 'change'),
  [
    (changed('optimizer', value_optimizer='adamw'), 'value_optimizer'),
    (changed('optimizer', value_master=True), 'value_master: False -> True'),
    (changed('optimizer', value_weight_decay=0.1), 'value_weight_decay'),
    (changed('table', dtype='float32'), 'table.dtype'),
    (
      changed(
        'model', changed('optimizer', value_optimizer='adamw'), memory=None
      ),
      'model.memory',
    ),
    (
      changed('model', rope_fraction=0.5),
      r'0.5\), and the parameters were trained',
    ),
    (changed('data', seq_len=64), 'rows would begin at other tokens'),
    (changed('train', seed=1), 'train.seed'),
  ],
)
def test_refused_as_the_state_would_not_fit(config, change, tmp_path):
  save_config(CONFIG, tmp_path)
  with pytest.raises(UserError, match=change):
    open_workdir(config, tmp_path)


def of_pictures(is_tied=True, **fields):
  def stream(**more):
    return ModelConfig(
      num_layers=1, model_dim=16, num_heads=1, num_kv_heads=1, head_dim=8,
      mlp_dim=8, **more,
    )  # fmt: skip

  vision = VisionConfig(
    stream=stream(is_causal=False), image_size=4, patch_size=2
  )
  return Config(
    model=stream(vocab_size=9, tie_embeddings=is_tied),
    multimodal=MultiModalConfig(
      vision=vision, fused_dim=8, num_fusion_layers=1, **fields
    ),
    data=DataConfig(pairs='pictures', tokenizer='words'),
    train=TrainConfig(sample_tokens=0),
  )


@pytest.mark.parametrize(
  ('before', 'after'),
  [
    (dict(), dict(matching_weight=1.0)),
    (dict(matching_weight=0.5), dict(matching_weight=1.0)),
    (dict(), dict(caption_weight=1.0)),
    (dict(is_tied=False), dict(is_tied=False, caption_weight=1.0)),
    (
      dict(is_tied=False, caption_weight=2.0),
      dict(is_tied=False, caption_weight=1.0),
    ),
    (
      dict(matching_weight=1.0),
      dict(matching_weight=1.0, contrastive_weight=0.0),
    ),
    (dict(), dict(contrastive='infonce')),
    (
      dict(num_frames=2, frame_choice='change'),
      dict(num_frames=2, frame_choice='uniform'),
    ),
    (dict(num_frames=2, frame_choice='change'), dict(num_frames=2)),
  ],
)
def test_parameters_are_others_where_it_is_said(before, after, tmp_path):
  def shapes(config):
    images = np.zeros((1, *config.multimodal.image_shape), np.float32)
    module = MultiModalEncoder(config=config.multimodal, model=config.model)
    tokens = np.ones((1, 3), np.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), tokens, images)
    return jax.tree.map(lambda x: x.shape, params)

  before, after = of_pictures(**before), of_pictures(**after)
  save_config(before, tmp_path)
  if shapes(before) == shapes(after):
    _, (told,) = open_workdir(after, tmp_path)
    assert 'from here on' in told
  else:
    with pytest.raises(UserError, match='and the parameters are others'):
      open_workdir(after, tmp_path)


@pytest.mark.parametrize('rates', [(0.0, 0.01), (0.01, 0.02)])
def test_biases_of_experts_are_there_or_not(rates, tmp_path):
  before, after = (
    Config(model=ModelConfig(moe=MoEConfig(bias_update_rate=rate)))
    for rate in rates
  )
  save_config(before, tmp_path)
  if rates[0]:
    assert 'from here on' in open_workdir(after, tmp_path)[1][0]
  else:
    with pytest.raises(UserError, match='and the parameters are others'):
      open_workdir(after, tmp_path)


def leaves(cls, prefix=''):
  """Names of all fields, those of parts that a model may have too."""
  for name, hint in typing.get_type_hints(cls).items():
    parts = [
      t for t in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(t)
    ]
    if not parts or type(None) in typing.get_args(hint):
      yield f'{prefix}{name}'
    for part in parts:
      yield from leaves(part, f'{prefix}{name}.')


def test_every_field_has_a_meaning():
  by_content = {
    *field_meanings.TEXT,
    *field_meanings.TOKENIZER,
    field_meanings.LANES,
  }
  assert by_content.isdisjoint(field_meanings.MEANINGS)
  assert set(leaves(Config)) == by_content | field_meanings.MEANINGS.keys()
  assert all(
    m.text for m in field_meanings.MEANINGS.values() if not m.is_allowed
  )


@pytest.fixture
def begun(tmp_path, monkeypatch):
  """A workdir with a checkpoint's record."""
  save_config(CONFIG, tmp_path)
  tokenizer_lib.ByteTokenizer().save(tmp_path)
  record = dict(data=dict(corpus='key', seed=0, num_lanes=16))
  monkeypatch.setattr(resume.checkpoint, 'read_record', lambda w: record)
  return tmp_path


def test_the_same_data_under_other_names(begun, tmp_path):
  named = tmp_path / 'elsewhere'
  tokenizer_lib.ByteTokenizer().save(named)
  for fields in (
    dict(text='/other/disk/*.txt'),
    dict(split='bytes'),
    dict(num_lanes=16),
    dict(tokenizer=str(named / 'tokenizer.json')),
  ):
    require_same_data(changed('data', **fields), CORPUS, begun)


@pytest.mark.parametrize(
  ('config', 'corpus', 'words'),
  [
    (CONFIG, 'other', 'another text.*hash is key.*of this text other'),
    (changed('data', num_lanes=8), 'key', 'num_lanes must be 16.*got 8'),
    (changed('data', tokenizer='bpe'), 'key', "tokenizer = 'bpe' is not"),
    (changed('data', tokenizer='none.json'), 'key', 'none.json'),
  ],
)
def test_other_data_is_refused(config, corpus, words, begun):
  before = (begun / 'config.json').read_text()
  with pytest.raises(UserError, match=words):
    require_same_data(config, dataclasses.replace(CORPUS, key=corpus), begun)
  assert (begun / 'config.json').read_text() == before


def test_merges_of_another_text_are_another_tokenizer(tmp_path):
  """Where a run was killed before its first checkpoint."""
  config = changed('data', tokenizer='bpe', bpe_vocab_size=270)
  save_config(config, tmp_path)
  tokenizer_lib.make_tokenizer(config.data, CORPUS, tmp_path)
  moved = changed('data', config, text='moved/*.txt')
  require_same_data(moved, CORPUS, tmp_path)
  other = dataclasses.replace(
    CORPUS,
    key='other',
    train=[Piece(b'anderer Text, andere Paare ' * 20, True)],
  )
  with pytest.raises(UserError, match=r'tokenizer = .bpe. is not'):
    require_same_data(moved, other, tmp_path)


def test_a_missing_config_is_restored(tmp_path, monkeypatch):
  record = dict(data=dict(), config=to_json(CONFIG))
  monkeypatch.setattr(resume.checkpoint, 'read_record', lambda w: record)
  said = []
  _, told = open_workdir(changed('train', log_every=1), tmp_path, said.append)
  assert told == ['train.log_every: 10 -> 1']
  assert said == ['config.json was missing: the newest checkpoint has a copy.']


def test_a_longer_run_says_how_the_rate_jumps():
  record = dict(config=to_json(CONFIG))
  longer = changed('train', num_steps=1200)
  told = resume.rate_changes(record, longer, 300)
  assert told == [
    'the learning rate at step 300: 0.00184 -> 0.0027',
    'that of the value tables at step 300: 0.00184 -> 0.0027',
  ]
  assert resume.rate_changes(record, CONFIG, 300) == []
  # During the warm-up it is the same.
  assert resume.rate_changes(record, longer, 10) == []
  assert resume.rate_changes({}, longer, 300) == []
