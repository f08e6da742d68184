# SPDX-License-Identifier: Apache-2.0
"""Fields that had other names, or that are gone, in configs saved before."""

import dataclasses
import json

import pytest
from recipes import CONFIGS

from jaxsparse.config import (
  Config,
  DCMHAConfig,
  ModelConfig,
  MoEConfig,
  SparseAttentionConfig,
  fields,
  renamed,
  saved_config,
)
from jaxsparse.config.errors import UserError
from jaxsparse.experiments.compare import runs
from jaxsparse.run import command_line

CONFIG = Config(
  model=ModelConfig(
    attention_pattern=('local', 'sparse'),
    dcmha=DCMHAConfig(compose_probs=False),
    moe=MoEConfig(num_experts_per_token=3),
    sparse=SparseAttentionConfig(
      sparsity_loss_weight=0.25, sparsity_loss_warmup=0.5
    ),
  )
)


def as_before() -> dict:
  """What a former version wrote for `CONFIG`."""
  saved = json.loads(saved_config.to_json(CONFIG))
  dcmha, sparse = saved['model']['dcmha'], saved['model']['sparse']
  dcmha['pre'] = dcmha.pop('compose_scores')
  dcmha['post'] = dcmha.pop('compose_probs')
  moe = saved['model']['moe']
  moe['num_used'] = moe.pop('num_experts_per_token')
  sparse['budget_weight'] = sparse.pop('sparsity_loss_weight')
  sparse['budget_ramp'] = sparse.pop('sparsity_loss_warmup')
  dcmha |= dict(interleave=False, init='default')
  sparse |= dict(
    sinks=1, temperature=0.1, router_weight=1.0, summary_key='mean',
    query_chunk=512, history_summaries=0,
  )  # fmt: skip
  return saved


def test_old_names_are_read():
  assert saved_config.from_json(json.dumps(as_before())) == CONFIG


def test_a_part_that_is_not_there_lacks_no_field():
  saved = as_before()
  saved['model'] |= dict(dcmha=None, sparse=None, attention_pattern=['local'])
  expected = dataclasses.replace(
    CONFIG.model, dcmha=None, sparse=None, attention_pattern=('local',)
  )
  assert saved_config.from_json(json.dumps(saved)).model == expected
  # As it was before there were such parts.
  del saved['model']['dcmha'], saved['model']['sparse']
  assert saved_config.from_json(json.dumps(saved)).model == expected


def test_what_changes_nothing_any_more_may_have_any_value():
  saved = as_before()
  saved['model']['dcmha']['init'] = 'identity'
  saved['model']['sparse']['query_chunk'] = 64
  assert saved_config.from_json(json.dumps(saved)) == CONFIG


@pytest.mark.parametrize('path', renamed.REMOVED)
def test_what_is_gone_had_its_default(path):
  saved = as_before()
  _, part, name = path.split('.')
  assert saved['model'][part][name] == renamed.REMOVED[path]
  saved['model'][part][name] = 'another'
  with pytest.raises(UserError, match=rf"^{path} = 'another' of the saved"):
    saved_config.from_json(json.dumps(saved))


@pytest.mark.parametrize('path', renamed.RENAMED)
def test_an_old_flag_names_the_new_one(path):
  new = renamed.RENAMED[path]
  assert new in fields.paths(Config)
  flags = [f'--config.{path}=1']
  with pytest.raises(UserError, match=rf'^--config.{path} is --config.{new} '):
    command_line.read_recipe(str(CONFIGS / 'joined.py:tiny'), flags)


@pytest.mark.parametrize('path', [*renamed.REMOVED, *renamed.UNNEEDED])
def test_a_flag_of_what_is_gone_says_so(path):
  assert path not in fields.paths(Config)
  flags = [f'--config.{path}=1']
  with pytest.raises(UserError, match=rf'^--config.{path} is gone: '):
    command_line.read_recipe(str(CONFIGS / 'joined.py:tiny'), flags)


def test_results_of_before_are_those_of_the_same_config():
  new = json.loads(saved_config.to_json(CONFIG))
  defaults = json.loads(saved_config.to_json(Config()))
  old = as_before()
  renamed.renew(old)
  assert runs._is_same(old, new, defaults)
  assert not runs._is_same(as_before(), new, defaults)
