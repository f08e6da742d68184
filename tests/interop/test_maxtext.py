# SPDX-License-Identifier: Apache-2.0
"""A DCFormer of MaxText is the one that its PyTorch weights are."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest
from imported import read
from test_dcformer import CONFIG, D, F, H, N, V, weights_of
from test_dcformer import write as write_pytorch

from jaxsparse.cli.convert_from_hf import open_path
from jaxsparse.config.errors import UserError
from jaxsparse.interop import importing

YAML = dict(
  decoder_block='dcformer', window_size=[3, None], vocab_size=V,
  normalization_layer_epsilon=1e-5, qk_norm=True, pre_compose=True,
  post_compose=True, static_proj=False, max_target_length=65,
  mlp_activations=['silu', 'linear'], run_name='x',
)  # fmt: skip
PADDED = V + 6


def arrays_of(weights, blocks=1):
  """The state of a run whose blocks `weights` are."""
  w = weights
  num_layers = sum(name.endswith('.wqkv.weight') for name in w)
  pattern = num_layers // blocks
  tree = {
    'token_embedder': {'embedding': padded(w['tok_embeddings.weight'])},
    'decoder': {
      'decoder_norm': {'scale': w['norm.weight']},
      'logits_dense': {'kernel': padded(w['output.weight']).T},
    },
  }
  layers = {}

  def put(path, block, array):
    *folders, name = path.split('.')
    at = layers
    for folder in folders:
      at = at.setdefault(folder, {})
    at.setdefault(name, {})[block] = array

  for i in range(num_layers):
    b, at = i % pattern, f'layers.{i}'
    attention = f'self_attention_{b}'
    qkv = w[f'{at}.attention.wqkv.weight'].reshape(3, N, H, D)
    for name, x in zip(('query', 'key', 'value'), qkv, strict=True):
      put(f'{attention}.{name}.kernel', i // pattern, x.transpose(2, 0, 1))
    out = w[f'{at}.attention.wo.weight'].T.reshape(N, H, D)
    put(f'{attention}.out.kernel', i // pattern, out)
    for name in ('q_norm', 'k_norm'):
      scale = w[f'{at}.attention.{name}.scale']
      put(f'{attention}.{name}.scale', i // pattern, scale)
    proj = f'{attention}.AttentionOp_0.dyn_w_proj'
    theirs = f'{at}.attention.dyn_w_proj'
    put(f'{proj}.dw1.kernel', i // pattern, w[f'{theirs}.dw1'])
    put(f'{proj}.qkw', i // pattern, w[f'{theirs}.qkw'])
    put(f'{proj}.dd.kernel', i // pattern, w[f'{theirs}.dd'])
    for name, of in (('wi_0', 'w1'), ('wi_1', 'w3'), ('wo', 'w2')):
      kernel = w[f'{at}.feed_forward.{of}.weight'].T
      put(f'mlp_{b}.{name}.kernel', i // pattern, kernel)
    for name, of in (('pre', 'attention_norm'), ('post', 'ffn_norm')):
      scale = w[f'{at}.{of}.weight']
      put(f'{name}_self_attention_layer_norm_{b}.scale', i // pattern, scale)
  tree['decoder']['layers'] = stacked(layers)
  return tree


def padded(table):
  return np.concatenate([table, np.full((PADDED - V, D), 9, np.float32)])


def stacked(tree):
  """Arrays of blocks as one, with the block as axis 1."""
  if 0 in tree:
    return np.stack([tree[i] for i in sorted(tree)], axis=1)
  return {name: stacked(part) for name, part in tree.items()}


def write(folder, tree, yaml=YAML, is_one_file=True):
  state = {'params': tree, 'opt_state': {'mu': np.ones(3)}, 'step': np.int32(7)}
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=is_one_file)
  ocp.Checkpointer(handler).save(folder / '7' / 'state', state)
  # JSON is YAML.
  (folder / 'config.yml').write_text(json.dumps(yaml))
  return folder


@pytest.mark.parametrize('is_one_file', [True, False])
def test_parameters_are_those_of_the_pytorch_weights(tmp_path, is_one_file):
  """Both layouts of one model, which differ in its generators' GELU."""
  config = CONFIG | dict(n_layer=4)
  weights = weights_of(config)
  tree = arrays_of(weights, blocks=2)
  folder = write(tmp_path / 'a', tree, is_one_file=is_one_file)
  opened = open_path(folder)
  assert opened.config.vocab_size == V
  assert opened.length == 64
  assert opened.config.mlp_dim == F
  assert opened.config.dcmha.gelu == 'tanh'
  assert opened.config.attention_pattern == ('local', 'global')
  theirs = open_path(write_pytorch(tmp_path / 'b', config, weights))
  ours, params = leaves(read(opened)), leaves(read(theirs))
  assert ours.keys() == params.keys()
  for path, x in params.items():
    np.testing.assert_array_equal(ours[path], x, err_msg=path)


def leaves(tree, at=''):
  if not isinstance(tree, dict):
    return {at: np.asarray(tree)}
  found = {}
  for name, part in tree.items():
    found |= leaves(part, f'{at}/{name}')
  return found


def test_rows_beyond_the_vocabulary_are_left_out(tmp_path):
  weights = weights_of(CONFIG)
  opened = open_path(write(tmp_path / 'a', arrays_of(weights)))
  table = opened.source.read('token_embedder.embedding')
  np.testing.assert_array_equal(table, weights['tok_embeddings.weight'])


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    (dict(pre_compose=False), 'pre_compose = False'),
    (dict(decoder_block='llama2'), "decoder_block = 'llama2'"),
    (dict(mlp_activations=['gelu']), 'mlp_activations'),
    (dict(window_size=[3, 5]), 'windows of one size'),
    (dict(vocab_size=None), 'lacks vocab_size'),
  ],
)
def test_other_models_are_refused(tmp_path, fields, words):
  tree = arrays_of(weights_of(CONFIG))
  with pytest.raises(UserError, match=words):
    open_path(write(tmp_path / 'a', tree, YAML | fields))


def test_a_run_without_its_config_is_refused(tmp_path):
  folder = write(tmp_path / 'a', arrays_of(weights_of(CONFIG)))
  (folder / 'config.yml').unlink()
  with pytest.raises(UserError, match=r'without a config\.yml'):
    open_path(folder)
  (folder / 'config.yml').write_text('a: [')
  with pytest.raises(UserError, match="can't be read as YAML"):
    open_path(folder)


def test_a_missing_array_is_told(tmp_path):
  tree = arrays_of(weights_of(CONFIG))
  del tree['decoder']['layers']['mlp_1']['wo']
  opened = open_path(write(tmp_path / 'a', tree))
  with pytest.raises(UserError, match=r'lacks 1\.mlp\.wo\.kernel'):
    importing.import_model(opened, tmp_path / 'w')
