# SPDX-License-Identifier: Apache-2.0
"""Training beside PyTorch: what is refused, the peer's maths, a whole run."""

import json

import jax
import numpy as np
import pytest

from jaxsparse.config.errors import UserError
from jaxsparse.experiments.bench import (
  command,
  measuring,
  torch_dense,
  train_sizes,
)
from jaxsparse.nn.transformer import Transformer


@pytest.mark.parametrize(
  ('flag', 'words'),
  [
    ('--sizes=huge', "--sizes must be of tiny, 25m, got 'huge'"),
    ('--peer=numpy', "--peer must be torch or '', got 'numpy'"),
  ],
)
def test_what_there_is_not_is_refused(flag, words):
  with pytest.raises(UserError, match=words):
    command.main(['train', flag])


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--rounds=0'], '--rounds must be at least 1, got 0'),
    (['--json=/nosuch/x.json'], "--json='/nosuch/x.json' can't be written"),
    (['--scores=4', '--selected=9'], '--selected must be from 1 to --scores=4'),
  ],
)
def test_benches_refuse_before_they_measure(flags, words):
  with pytest.raises(UserError, match=words):
    command.main(['top_m', *flags])


def test_contenders_have_the_same_budget():
  flops = [
    train_sizes.flops(train_sizes.config_of(name, 'tiny'))
    for name in train_sizes.contenders('tiny', 'torch')
  ]
  assert max(flops) / min(flops) < 1.02


@pytest.mark.slow
def test_the_peer_computes_what_our_model_does():
  if not measuring.has_torch():
    pytest.skip('torch is not installed')
  import torch

  config = train_sizes.config_of('torch', 'tiny').model
  tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
  start = jax.jit(Transformer(config).init_with_output)
  (ours, _, _), variables = start(jax.random.key(0), tokens)
  params = variables['params']
  model = torch_dense.make_model(config)
  weights = {'table.weight': params['embed']['table']}
  for i in range(config.num_layers):
    block = params[f'block_{i:02}']
    heads = [block['attention'][n] for n in ('query', 'key', 'value')]
    merged = np.concatenate([np.reshape(h, (len(h), -1)) for h in heads], 1)
    output = np.reshape(block['attention']['output'], (-1, config.model_dim))
    names = dict(heads=merged, output=output) | block['mlp']
    for name, value in names.items():
      weights[f'blocks.{i}.{name}.weight'] = np.transpose(value)
  assert weights.keys() == {
    n for n, _ in model.named_parameters() if 'norm' not in n
  }
  model.load_state_dict(
    {n: torch.tensor(np.array(w)) for n, w in weights.items()}, strict=False
  )
  with torch.no_grad():
    theirs = model.logits(model(torch.tensor(tokens, dtype=torch.int64)))
  np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_whole_run_is_measured(tmp_path, capsys):
  path = tmp_path / 'train.json'
  command.main(
    [
      *('train', '--peer=', '--sizes=tiny', '--rounds=1', '--turn=0.1'),
      f'--json={path}',
    ]
  )
  printed = capsys.readouterr().out
  assert 'tiny jaxsparse dense: first step after' in printed
  results = json.loads(path.read_text())['results']
  assert [r['contender'] for r in results] == list(train_sizes.OURS)
  tasks = {'train', 'matmul', 'prefill 1', 'prefill 16', 'decode 1'}
  assert all(r['seconds'].keys() >= tasks for r in results)
