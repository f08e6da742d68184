# SPDX-License-Identifier: Apache-2.0
"""DCFormer and DCPythia in their own layouts, against the paper in NumPy."""

import json
import math

import numpy as np
import pytest
from loading import loaded
from safetensors.numpy import save_file

from jaxsparse.config.errors import UserError
from jaxsparse.interop import hugging_face
from jaxsparse.interop.config_json import read

D, N, H, F, V, L, T = 32, 4, 8, 40, 50, 2, 9
RANK = 2

CONFIG = dict(
  auto_map={'AutoModelForCausalLM': 'modeling.Model'}, model_type='dcformer',
  block_size=64, dim=D, n_head=N, n_layer=L, n_local_heads=N, head_dim=64,
  intermediate_size=F, norm_eps=1e-5, rope_base=10000, vocab_size=V,
  window_size=3, window_type=None, use_qk_norm=True, use_dcmha=True,
  query_wise=False, tie_word_embeddings=False, is_training=False,
  q_chunk_size=128, use_gradient_checkpointing=False, bos_token_id=1,
  torch_dtype='float16',
)  # fmt: skip
PYTHIA = CONFIG | dict(
  model_type='dcpythia', rotary_pct=0.25, use_linear_bias=True,
  use_parallel_residual=True,
)  # fmt: skip


def weights_of(config, seed=0):
  """Random tensors under the names and shapes of the published files."""
  rng = np.random.default_rng(seed)
  is_pythia = config['model_type'] == 'dcpythia'
  found = {}

  def add(name, *shape, scale=0.3, mean=0.0):
    content = mean + scale * rng.normal(size=shape)
    found[name] = content.astype(np.float32)

  def norm(name):
    add(f'{name}.weight', D, scale=0.2, mean=1.0)
    if is_pythia:
      add(f'{name}.bias', D, scale=0.2)

  def linear(name, out, inner):
    add(f'{name}.weight', out, inner)
    if is_pythia:
      add(f'{name}.bias', out, scale=0.2)

  add('tok_embeddings.weight', V, D)
  add('output.weight', V, D)
  norm('norm')
  for i in range(config['n_layer']):
    at = f'layers.{i}'
    norm(f'{at}.attention_norm')
    norm(f'{at}.ffn_norm')
    linear(f'{at}.attention.wqkv', 3 * N * H, D)
    linear(f'{at}.attention.wo', D, N * H)
    for name in 'qk':
      add(f'{at}.attention.{name}_norm.scale', H, scale=0.2, mean=1.0)
    proj, width = f'{at}.attention.dyn_w_proj', 2 * RANK * N
    add(f'{proj}.dw1', D, 1, 4, width)
    add(f'{proj}.qkw', 1, 4, width, 2 * RANK, N)
    add(f'{proj}.dd', D, 1, 4 * N)
    for place in ('pre', 'post'):
      found[f'{proj}.{place}_proj.w'] = np.eye(N, dtype=np.float32)[None]
    linear(f'{at}.feed_forward.w1', F, D)
    linear(f'{at}.feed_forward.w2', D, F)
    if not is_pythia:
      linear(f'{at}.feed_forward.w3', F, D)
  return found


def write(folder, config, weights):
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  save_file(weights, folder / 'model.safetensors')
  return folder


def opened(folder):
  return hugging_face.open_folder(folder, read(folder))


# The model of arXiv:2405.08553 for one sequence, in float64.

erf = np.vectorize(math.erf)


def gelu(x):
  return x * (1 + erf(x / math.sqrt(2))) / 2


def rms(x, epsilon):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon)


def rotated(x, share, base):
  """[T, N, H] with the first coordinates turned, halves against each other."""
  width = int(H * share)
  angle = np.arange(T)[:, None] / base ** (np.arange(0, width, 2) / width)
  cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
  a, b = np.split(x[..., :width], 2, axis=-1)
  turned = [a * cos - b * sin, b * cos + a * sin, x[..., width:]]
  return np.concatenate(turned, axis=-1)


def composed(scores, q, k, static):
  """Scores [N, T, S] mixed over heads by what queries and keys generated."""
  found = scores + np.einsum('nts,nm->mts', scores, static)
  for (w1, w2, gate), at in ((q, 't'), (k, 's')):
    read = np.einsum(f'nts,{at}in->its', scores, w1)
    found += np.einsum(f'its,{at}in->nts', read, w2)
    found += np.einsum(f'nts,{at}n->nts', scores, gate)
  return found


def oracle(weights, config, tokens, static=0.0):
  w = {name: x.astype(np.float64) for name, x in weights.items()}
  is_pythia = config['model_type'] == 'dcpythia'
  share = config['rotary_pct'] if is_pythia else 1.0

  def norm(x, name):
    if is_pythia:
      x = x - x.mean(-1, keepdims=True)
    return rms(x, 1e-5) * w[f'{name}.weight'] + w.get(f'{name}.bias', 0)

  def linear(x, name):
    return x @ w[f'{name}.weight'].T + w.get(f'{name}.bias', 0)

  def attention(x, i):
    at = f'layers.{i}.attention'
    q, k, v = linear(x, f'{at}.wqkv').reshape(T, 3, N, H).swapaxes(0, 1)
    q = rotated(rms(q, 1e-6) * w[f'{at}.q_norm.scale'], share, 1e4)
    k = rotated(rms(k, 1e-6) * w[f'{at}.k_norm.scale'], share, 1e4)
    hidden = gelu(np.einsum('td,dck->tck', x, w[f'{at}.dyn_w_proj.dw1'][:, 0]))
    made = np.einsum('tck,ckim->tcim', hidden, w[f'{at}.dyn_w_proj.qkw'][0])
    w1, w2 = rms(made[:, :, :RANK], 1e-6), made[:, :, RANK:]
    gates = np.tanh(x @ w[f'{at}.dyn_w_proj.dd'][:, 0]).reshape(T, 4, N)
    streams = [(w1[:, c], w2[:, c], gates[:, c]) for c in range(4)]
    scores = np.einsum('tnh,snh->nts', q, k) / math.sqrt(H)
    scores = composed(scores, *streams[:2], np.full((N, N), static))
    distance = np.arange(T)[:, None] - np.arange(T)[None]
    seen = distance >= 0
    if i % 2 == 0:
      seen &= distance < config['window_size']
    scores = np.where(seen, scores, -1e30)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    probs = composed(probs, *streams[2:], np.full((N, N), static))
    read = np.einsum('nts,snh->tnh', probs, v).reshape(T, N * H)
    return linear(read, f'{at}.wo')

  def mlp(x, at):
    x1 = linear(x, f'{at}.w1')
    if is_pythia:
      return linear(gelu(x1), f'{at}.w2')
    return linear(x1 / (1 + np.exp(-x1)) * linear(x, f'{at}.w3'), f'{at}.w2')

  x = w['tok_embeddings.weight'][tokens]
  for i in range(L):
    h = x + attention(norm(x, f'layers.{i}.attention_norm'), i)
    of_mlp = norm(x if is_pythia else h, f'layers.{i}.ffn_norm')
    x = h + mlp(of_mlp, f'layers.{i}.feed_forward')
  return norm(x, 'norm') @ w['output.weight'].T


TOKENS = np.random.default_rng(5).integers(0, V, (1, T)).astype(np.int32)


def assert_equal(found, wanted):
  scale = np.abs(wanted).max()
  np.testing.assert_allclose(found / scale, wanted / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize('config', [CONFIG, PYTHIA], ids=['former', 'pythia'])
def test_logits_are_those_of_the_paper(tmp_path, config):
  weights = weights_of(config)
  folder = write(tmp_path / 'a', config, weights)
  assert opened(folder).length == 64
  _, params, apply = loaded(opened(folder))
  wanted = oracle(weights, config, TOKENS[0])
  assert_equal(apply(params, TOKENS)[0], wanted)
  # Neither windows nor composed heads are without effect.
  for other in (config | dict(window_size=4), config | dict(window_size=9)):
    assert np.abs(oracle(weights, other, TOKENS[0]) - wanted).max() > 1e-2


def test_merged_maps_count_where_they_differ(tmp_path):
  weights = weights_of(CONFIG)
  trained = weights_of(CONFIG, seed=1)
  names = [n for n in weights if n.endswith(('.dw1', '.qkw', '.dd'))]
  both = dict(weights)
  for i in range(L):
    at = f'layers.{i}.attention.dyn_w_proj'
    # One block's are copies still.
    of = weights if i == 1 else trained
    flat = [of[f'{at}.{name}'].reshape(D, -1) for name in ('dw1', 'dd')]
    both[f'{at}.dw_m'] = np.concatenate(flat, axis=1)
    both[f'{at}.qkw_m'] = of[f'{at}.qkw'].reshape(4, 2 * RANK * N, -1)
  folder = write(tmp_path / 'a', CONFIG, both)
  found = opened(folder)
  assert '2 merged maps differ' in found.notes[0]
  for name in names:
    of = weights if name.startswith('layers.1.') else trained
    np.testing.assert_array_equal(found.source.read(name), of[name])
  assert not [n for n in found.source.names() if n.endswith('_m')]
  copies = write(tmp_path / 'b', CONFIG, weights | {
    'layers.0.attention.dyn_w_proj.qkw_m': weights[
      'layers.0.attention.dyn_w_proj.qkw'].reshape(4, 2 * RANK * N, -1)
  })  # fmt: skip
  assert not opened(copies).notes


def test_a_static_map_is_a_base(tmp_path):
  weights = weights_of(CONFIG)
  for name in weights:
    if name.endswith('_proj.w'):
      weights[name] = np.full((1, N, N), 0.3, np.float32)
  folder = write(tmp_path / 'a', CONFIG, weights)
  _, params, apply = loaded(opened(folder))
  wanted = oracle(weights, CONFIG, TOKENS[0], static=0.3)
  assert_equal(apply(params, TOKENS)[0], wanted)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    (dict(mgate=True, mgate_dim=44), 'mgate = True'),
    (dict(query_wise=True), 'query_wise = True'),
    (dict(use_dcmha=False), 'use_dcmha = False'),
    (dict(n_local_heads=2), 'n_local_heads = 2'),
    (dict(window_type='GL'), "window_type = 'GL'"),
    (dict(window_type='LGLL'), 'window_size = 3 .* must be 256'),
    (dict(n_head=5), 'must be a multiple of n_head = 5'),
    (dict(use_relu=True), 'use_relu = True .* unknown'),
    (dict(rope_base=None), 'lacks rope_base'),
  ],
)
def test_other_models_are_refused(fields, words):
  with pytest.raises(UserError, match=words):
    hugging_face.to_config(hugging_face.dcformer, CONFIG | fields)


def test_patterns_have_names():
  fields = dict(window_type='LGLL', window_size=256)
  config = hugging_face.to_config(hugging_face.dcformer, CONFIG | fields)
  assert config.attention_pattern == ('local', 'global', 'local', 'local')
  assert config.window == 256


def test_half_a_static_map_is_damage(tmp_path):
  weights = weights_of(CONFIG)
  name = 'layers.1.attention.dyn_w_proj.post_proj.w'
  weights[name] = weights[name] + 1
  with pytest.raises(UserError, match='and others are not'):
    opened(write(tmp_path / 'a', CONFIG, weights))
