# SPDX-License-Identifier: Apache-2.0
"""Maps of attention: rows, masks, gradients by finite differences, rollouts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import exit_code
from small_run import save_untrained

from jaxsparse.analysis import plots
from jaxsparse.config import DCMHAConfig, ModelConfig, SparseAttentionConfig
from jaxsparse.inference.attention_maps import (
  extract_maps,
  grad_cam,
  relevance,
  rollout,
)
from jaxsparse.nn.attention.maps import ATTENTION_PROBES, MAPS
from jaxsparse.nn.transformer import Transformer
from jaxsparse.run import checkpoint

LENGTH, WINDOW = 19, 5
CONFIG = ModelConfig(
  num_layers=3,
  model_dim=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  mlp_dim=16,
  vocab_size=257,
  attention_pattern=('global', 'local', 'sparse'),
  window=WINDOW,
  dcmha=DCMHAConfig(num_groups=2),
  sparse=SparseAttentionConfig(
    block=2, tile=2, window_blocks=1, max_blocks=2, coverage_logit=0.0
  ),
)
TOKENS = np.random.default_rng(0).integers(257, size=LENGTH).astype(np.int32)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  (folder / 'metrics.jsonl').write_text('{"step": 1, "loss": 3.0}\n')
  # Not as a run starts, where everything is even.
  return save_untrained(folder, CONFIG, deviation=0.3)


@pytest.fixture(scope='module')
def params(workdir):
  return checkpoint.load_params(workdir)[1]


@pytest.fixture(scope='module')
def maps(params):
  return extract_maps(CONFIG, params, TOKENS)


def test_weights_are_shares_of_what_is_seen(maps):
  t, s = np.indices((LENGTH, LENGTH))
  past = s <= t
  seen = {'global': past, 'local': past & (t - s < WINDOW), 'sparse': past}
  for layer in maps.layers:
    assert layer.weights.shape == (4, LENGTH, LENGTH)
    assert np.all(layer.weights[:, ~seen[layer.kind]] == 0)
    shares = layer.weights if layer.uncomposed is None else layer.uncomposed
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-5)
  composed, _, sparse = maps.layers
  assert np.abs(composed.weights - composed.uncomposed).max() > 1e-3
  assert sparse.uncomposed is None
  assert sparse.choice['block'].shape == (2, 10, 2)
  # The last tile is not full.
  shares = sparse.choice['shares'][:, : LENGTH // 2]
  np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-5)


def test_a_sparse_layer_reads_kept_blocks_token_by_token(maps):
  """And the tokens of a block that is not kept all alike: by its summary."""
  sparse = maps.layers[2]
  tile = 8
  kept = {
    int(b)
    for b, k in zip(
      sparse.choice['block'][0, tile],
      sparse.choice['is_kept'][0, tile],
      strict=True,
    )
    if k
  }
  # Blocks 7 and 8 are the window.
  eligible = set(range(tile - 1))
  assert kept
  assert kept < eligible
  for block in eligible:
    first, second = sparse.weights[0, 2 * tile, 2 * block : 2 * block + 2]
    assert (abs(first - second) > 1e-6) == (block in kept)


def test_gradient_is_the_change_of_the_logit(params, maps):
  """By how much the logit moves if one query reads a little more of a key."""
  layer, head, query, key = 1, 2, LENGTH - 1, LENGTH - 3

  @jax.jit
  def logit_and_values(read):
    probes = {
      f'block_0{i}': dict(
        attention=dict(read=read if i == layer else jnp.zeros_like(read))
      )
      for i in range(3)
    }
    positions = jnp.arange(LENGTH)[None]
    (logits, _, _), shown = Transformer(CONFIG).apply(
      {'params': params, ATTENTION_PROBES: probes},
      jnp.asarray(TOKENS)[None],
      positions,
      jnp.ones_like(positions),
      mutable=[MAPS],
    )
    value = shown[MAPS]['block_01']['attention']['value'][0]
    return logits[0, -1, maps.next_token], value

  more = np.zeros((1, LENGTH, 4, 4), np.float32)
  _, value = logit_and_values(more)
  more[0, query, head] = value[0, key, head // 2]
  step = 1e-2
  (above, _), (below, _) = map(logit_and_values, (step * more, -step * more))
  assert (above - below) / (2 * step) == pytest.approx(
    maps.layers[layer].gradient[head, query, key], rel=2e-2
  )


def test_rollout_rows_are_shares(maps):
  total = rollout(maps)
  np.testing.assert_allclose(total.sum(-1), 1)
  assert np.all(total[np.triu_indices(LENGTH, 1)] == 0)


def _forced(maps, key, gradient=0.0):
  """All heads read one token, and half of them gladly."""
  weights = np.zeros((4, LENGTH, LENGTH))
  weights[:, :key] = np.eye(LENGTH)[:key]
  weights[:, key:, key] = 1
  gradients = np.zeros_like(weights)
  gradients[:2] = gradient
  layers = tuple(
    dataclasses.replace(x, weights=weights, gradient=gradients)
    for x in maps.layers
  )
  return dataclasses.replace(maps, layers=layers)


def test_what_is_read_by_all_heads_is_lit(maps):
  total = rollout(_forced(maps, 7))
  assert total[-1].argmax() == 7
  assert total[-1, 7] == pytest.approx(1 - 0.5**3)
  total = relevance(_forced(maps, 7, gradient=1.0))
  assert total[-1, :-1].argmax() == 7
  assert np.all(np.delete(total[-1], [7, LENGTH - 1]) == 0)
  np.testing.assert_array_equal(
    relevance(_forced(maps, 7, gradient=-1.0)), np.eye(LENGTH)
  )


def test_grad_cam_is_its_formula(maps):
  total = grad_cam(_forced(maps, 7, gradient=3.0))
  # Each of two heads has LENGTH^2 equal gradients, and weights of sum LENGTH.
  alpha = 3**2 / (2 * 3**2 + LENGTH * 3**3)
  np.testing.assert_allclose(total[7:, 7], 2 * LENGTH**2 * alpha * 3)
  np.testing.assert_allclose(total[7:].sum(-1), total[7:, 7])
  assert not grad_cam(_forced(maps, 7, gradient=-1.0)).any()
  of_text = grad_cam(maps)
  assert of_text.min() == 0 < of_text.max()
  assert np.all(of_text[np.triu_indices(LENGTH, 1)] == 0)


def test_report_draws_it(workdir, capsys, monkeypatch):
  # Making room for labels takes as long as all else; other tests do it.
  monkeypatch.setitem(plots.STYLE, 'figure.constrained_layout.use', False)
  text = 'é <b>, look(at): '
  # With the boundary as long as TOKENS: the program of `maps` reads it.
  assert 1 + len(text.encode()) == LENGTH
  assert exit_code(['report', str(workdir), f'--attention={text}']) == 0
  names = [line.split('/')[-1] for line in capsys.readouterr().out.split()]
  assert names == [
    'training.png',
    'attention_tokens.png',
    'attention_block_00.png',
    'attention_block_01.png',
    'attention_block_02.png',
    'attention.html',
  ]
  for name in names[:-1]:
    data = (workdir / 'plots' / name).read_bytes()
    assert data.startswith(b'\x89PNG')
    assert len(data) > 10_000
  page = (workdir / 'plots' / 'attention.html').read_text()
  assert page.count('data:image/png;base64,') == 4
  assert '>&lt;</span>' in page
  assert '<b>' not in page


def test_report_refuses(workdir, capsys):
  texts = ['', 'x' * 2048, '@nothing.txt', 'no UTF-8 \udcff']
  for text in texts:
    assert exit_code(['report', str(workdir), f'--attention={text}']) == 2
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == len(texts)
  for line in lines:
    assert '--attention' in line
