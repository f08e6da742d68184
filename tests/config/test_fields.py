# SPDX-License-Identifier: Apache-2.0
"""What every field of every configuration class may hold.

The kinds are tested on all fields at once, so that a new field is tested, too.
"""

import copy
import dataclasses
import functools

import pytest

from jaxsparse.config import (
  Config,
  DataConfig,
  DCMHAConfig,
  MemoryConfig,
  MeshConfig,
  ModelConfig,
  MoEConfig,
  OptimizerConfig,
  RopeScalingConfig,
  SparseAttentionConfig,
  TableConfig,
  TrainConfig,
  fields,
)
from jaxsparse.config.errors import UserError

CLASSES = (
  DataConfig,
  ModelConfig,
  MemoryConfig,
  MoEConfig,
  DCMHAConfig,
  SparseAttentionConfig,
  RopeScalingConfig,
  OptimizerConfig,
  TrainConfig,
  MeshConfig,
)
NAN = float('nan')
INF = float('inf')


def fields_of(*hints):
  return [
    pytest.param(cls, name, id=f'{cls.__name__}.{name}')
    for cls in CLASSES
    for name, hint in fields.hints(cls).items()
    if not hints or hint in hints
  ]


def said(function, **values):
  with pytest.raises(UserError) as raised:
    function(**values)
  sentence = str(raised.value)
  assert sentence.endswith('.')
  assert '\n' not in sentence
  assert '<class' not in sentence
  return sentence


@functools.cache
def default(cls):
  return cls()


def checked(cls, **values):
  """Checks fields by hand: a constructor has its types checked in tests."""
  config = copy.copy(default(cls))
  for name, value in values.items():
    setattr(config, name, value)
  fields.check(config)


@pytest.mark.parametrize(('cls', 'name'), fields_of(float))
@pytest.mark.parametrize('value', [NAN, INF, -INF])
def test_numbers_are_finite(cls, name, value):
  expected = f'{name} must be a finite number, got {value}.'
  assert said(cls, **{name: value}) == expected


def test_numbers_of_a_tuple_are_finite():
  assert 'init_deviations must be a finite number' in said(
    ModelConfig, init_deviations=(0.1, NAN)
  )


@pytest.mark.parametrize(('cls', 'name'), fields_of(float))
def test_numbers_are_those_of_float32(cls, name):
  assert f'{name} must be a number of float32' in said(cls, **{name: 1e300})


@pytest.mark.parametrize(('cls', 'name'), fields_of(int))
def test_whole_numbers_fit_int32(cls, name):
  for value in 2**31, 10**20, 10**9999:
    expected = f'{name} must be at most 2,147,483,647, got '
    assert expected in said(cls, **{name: value})
  assert f'{name} must be at least' in said(cls, **{name: -(2**31)})


@pytest.mark.parametrize(('cls', 'name'), fields_of(str))
def test_text_has_no_nul_character(cls, name):
  assert f'{name} must not hold the NUL' in said(cls, **{name: 'a\0b'})


@pytest.mark.parametrize(('cls', 'name'), fields_of())
def test_types_are_checked(cls, name):
  for value in object(), b'', [1], {}, (None,), 1j, ((1,),):
    values = {name: value}
    assert f'{name} must be ' in said(checked, cls=cls, **values)


@pytest.mark.parametrize(
  ('cls', 'values', 'message'),
  [
    (ModelConfig, dict(attention_pattern=((1, 2),)), 'a tuple (text, ...)'),
    (ModelConfig, dict(init_deviations=((0, 0), (0, 0))), '(number, number)'),
    (ModelConfig, dict(init_deviations=(0.1,)), '(number, number)'),
    (
      MemoryConfig,
      dict(placements=((1, 2, 3),)),
      'a tuple ((whole number, whole number), ...)',
    ),
    (MemoryConfig, dict(placements=((1, True),)), 'whole number'),
    (ModelConfig, dict(num_layers=True), 'num_layers must be a whole number'),
    (ModelConfig, dict(memory=3), 'memory must be MemoryConfig or None'),
  ],
)
def test_types_in_tuples(cls, values, message):
  assert message in said(checked, cls=cls, **values)


@pytest.mark.parametrize(
  ('cls', 'values', 'message'),
  [
    (MemoryConfig, dict(placements=()), 'placements must name'),
    (ModelConfig, dict(num_layers=10**6), 'num_layers must be at most 10,000'),
    (ModelConfig, dict(vocab_size=99999999999), 'vocab_size must be at most'),
    (MemoryConfig, dict(num_keys=50_000), 'num_keys must be at most 46,340'),
    (MemoryConfig, dict(expansion=10**6), 'at most 65,536'),
    (
      MemoryConfig,
      dict(num_keys=2049, expansion=4, stored_addresses=True),
      'num_logical_keys must be at most 4,096, got 4098',
    ),
  ],
)
def test_sizes(cls, values, message):
  assert message in said(cls, **values)


TUCKER_OF_ONE_RANK = dict(tucker_rank=1)
ADDITIVE = dict(grid='additive')
SPARSE = dict(attention_pattern=('sparse',), sparse=SparseAttentionConfig())
# A class, settings of it, and those that do nothing beside them.
UNUSED = [
  (MemoryConfig, ADDITIVE, dict(tucker_rank=4)),
  (MemoryConfig, ADDITIVE, dict(num_cores=1)),
  (MemoryConfig, ADDITIVE, dict(aux_loss_weight=0.1)),
  (MemoryConfig, ADDITIVE, dict(aux_loss_margin=0.1)),
  (MemoryConfig, TUCKER_OF_ONE_RANK, dict(aux_loss_weight=0.1)),
  (MemoryConfig, TUCKER_OF_ONE_RANK, dict(split_key_dim=True)),
  (MemoryConfig, dict(aux_loss_weight=0.0), dict(aux_loss_margin=0.1)),
  (MemoryConfig, dict(expansion=1), dict(cores_per_pairing=True)),
  (MemoryConfig, dict(pre_value_dim=0), dict(pre_value_activation='gelu')),
  (MoEConfig, dict(num_experts=2), dict(bias_update_rate=0.1)),
  (MoEConfig, dict(num_experts=2), dict(balance_loss_weight=0.1)),
  (
    DCMHAConfig,
    dict(query_wise=False, key_wise=False, base=True),
    dict(rank=4),
  ),
  (
    DCMHAConfig,
    dict(query_wise=False, key_wise=False, base=True),
    dict(gelu='erf'),
  ),
  (RopeScalingConfig, dict(kind='linear'), dict(original_length=512)),
  (RopeScalingConfig, dict(kind='linear'), dict(low_frequency_factor=2.0)),
  (RopeScalingConfig, dict(kind='linear'), dict(high_frequency_factor=8.0)),
  (SparseAttentionConfig, dict(router='shared'), dict(router_heads=2)),
  (SparseAttentionConfig, dict(router='shared'), dict(router_dim=8)),
  (
    SparseAttentionConfig,
    dict(sparsity_loss_weight=0.0),
    dict(sparsity_loss_warmup=0.5),
  ),
  (SparseAttentionConfig, dict(max_fraction=0.5), dict(min_blocks=2)),
  (ModelConfig, dict(attention_pattern=('global',)), dict(window=8)),
  (ModelConfig, SPARSE, dict(window=8)),
  (ModelConfig, SPARSE, dict(query_chunk=8)),
  (ModelConfig, SPARSE, dict(attention_implementation='pallas')),
  (ModelConfig, dict(qk_norm='none'), dict(qk_norm_epsilon=1e-6)),
  (DataConfig, dict(tfds=''), dict(tfds_feature='body')),
  (DataConfig, dict(tfds=''), dict(tfds_train_split='all')),
  (DataConfig, dict(tfds=''), dict(tfds_validation_split='all')),
  (DataConfig, dict(tfds='lm1b'), dict(split='bytes')),
  (DataConfig, dict(tfds='lm1b'), dict(validation_fraction=0.5)),
  (DataConfig, dict(tfds='lm1b'), dict(test_fraction=0.5)),
  (DataConfig, dict(tokenizer='bytes'), dict(bpe_vocab_size=300)),
  (
    OptimizerConfig,
    dict(value_learning_rate=1e-3),
    dict(value_lr_multiplier=2.0),
  ),
  (
    OptimizerConfig,
    dict(value_learning_rate=1e-3),
    dict(value_lr_decay_fraction=0.5),
  ),
  (
    OptimizerConfig,
    dict(value_lr_multiplier=1.0),
    dict(value_lr_decay_fraction=0.5),
  ),
  (OptimizerConfig, dict(value_optimizer='adamw'), dict(value_row_budget=9)),
  (TrainConfig, dict(sample_tokens=0), dict(sample_prompt='x')),
]


@pytest.mark.parametrize(('cls', 'settings', 'unused'), UNUSED)
def test_settings_that_do_nothing_are_refused(cls, settings, unused):
  (name, value), *_ = unused.items()
  sentence = said(cls, **settings, **unused)
  assert sentence.startswith(f'{name} = {value!r} does nothing with ')
  # Its default is no setting.
  default = {f.name: f.default for f in dataclasses.fields(cls)}[name]
  cls(**settings, **{name: default})


def test_what_has_an_effect_is_accepted():
  """The same settings, where they do something."""
  MemoryConfig(tucker_rank=4, num_cores=1, aux_loss_weight=0.1)
  MemoryConfig(tucker_rank=1, aux_loss_weight=0.0)
  MemoryConfig(grid='additive', aux_loss_weight=0.0)
  MemoryConfig(pre_value_dim=8, pre_value_map=False)
  MoEConfig(bias_update_rate=0.1, balance_loss_weight=0.1)
  SparseAttentionConfig(sparsity_loss_weight=0.1, sparsity_loss_warmup=0.5)
  ModelConfig(attention_pattern=('local',), window=8)
  OptimizerConfig(value_lr_multiplier=2.0, value_lr_decay_fraction=0.5)
  OptimizerConfig(value_optimizer='row_adam', value_row_budget=9)


VALUES = dict(
  value_weight_decay=0.1,
  value_lr_multiplier=2.0,
  value_learning_rate=1e-3,
  value_optimizer='row_adam',
  value_master=True,
)


@pytest.mark.parametrize('name', VALUES)
def test_settings_of_values_need_a_memory(name):
  optimizer = OptimizerConfig(**{name: VALUES[name]})
  expected = f'{name} = {VALUES[name]!r} does nothing with model.memory = None'
  assert expected in said(Config, optimizer=optimizer)
  memory = MemoryConfig(table=TableConfig(dtype='bfloat16'))
  Config(optimizer=optimizer, model=ModelConfig(memory=memory))


def test_a_master_needs_tables_of_fewer_bits():
  optimizer = OptimizerConfig(value_master=True)
  model = ModelConfig(memory=MemoryConfig())
  sentence = said(Config, optimizer=optimizer, model=model)
  assert 'value_master = True does nothing with memory.table.dtype' in sentence


def test_row_optimizers_add_up_no_dense_gradient():
  optimizer = OptimizerConfig(value_optimizer='row_adam')
  model = ModelConfig(memory=MemoryConfig(table=TableConfig(gradient='sorted')))
  assert "'sorted' does nothing" in said(
    Config, optimizer=optimizer, model=model
  )


@pytest.mark.parametrize(
  ('warmup', 'num_steps', 'expected'),
  [(50, 600, 50), (50, 51, 50), (50, 50, 5), (50, 9, 0), (0, 1, 0)],
)
def test_warmup_of_a_short_run_is_a_tenth(warmup, num_steps, expected):
  optimizer = OptimizerConfig(warmup_steps=warmup)
  assert optimizer.warmup_within(num_steps) == expected
  Config(optimizer=optimizer, train=TrainConfig(num_steps=num_steps))


TEXTS = [
  ('4', int, 4),
  ('-1', int, -1),
  ('1_000', int, 1000),
  ('3', float, 3.0),
  ('1e-3', float, 1e-3),
  ('true', bool, True),
  ('False', bool, False),
  ('0', bool, False),
  ('', str, ''),
  ("'a'", str, "'a'"),
  ('None', str, 'None'),
  ('None', MemoryConfig | None, None),
  ('3', int | None, 3),
  ('None', int | None, None),
  ('a,b', tuple[str, ...] | str, ('a', 'b')),
  ("('local', 'global')", tuple[str, ...], ('local', 'global')),
  ("['local']", tuple[str, ...], ('local',)),
  ('local', tuple[str, ...], ('local',)),
  ('local,global', tuple[str, ...], ('local', 'global')),
  ('((0,1),(2,3))', tuple[tuple[int, int], ...], ((0, 1), (2, 3))),
  ('(0.1, 2)', tuple[float, float], (0.1, 2)),
]


def test_whole_numbers_become_floats_where_these_are_meant():
  deviation, _ = fields.parse('(1, 0.5)', tuple[float, float])
  assert type(deviation) is float
  with pytest.raises(ValueError, match='999'):
    fields.parse(f'({"9" * 400}, 1)', tuple[float, float])


@pytest.mark.parametrize(('text', 'hint', 'expected'), TEXTS)
def test_text_is_read_by_its_type(text, hint, expected):
  value = fields.parse(text, hint)
  assert value == expected
  assert type(value) is type(expected)


@pytest.mark.parametrize(
  ('text', 'hint'),
  [
    ('four', int),
    ('4.5', int),
    ('', int),
    ('9' * 5000, int),
    ('x', float),
    ('yes', bool),
    ('2', bool),
    ('3', MemoryConfig | None),
    ('[[1,2]]', tuple[str, ...]),
    ('1,2', tuple[str, ...]),
    ('((0,1),2)', tuple[tuple[int, int], ...]),
    ('(True, 1)', tuple[int, int]),
    ('(1, 2, 3)', tuple[int, int]),
    ('(' * 500, tuple[int, int]),
    ('__import__("os")', tuple[str, ...]),
    ('a\0', tuple[int, int]),
  ],
)
def test_text_of_another_type_is_refused(text, hint):
  # Its message is not used.
  with pytest.raises(ValueError, match=r'.*'):
    fields.parse(text, hint)
