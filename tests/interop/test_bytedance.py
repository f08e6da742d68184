# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of UltraMem's trainer, against its own layers and in NumPy."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loading import loaded
from safetensors.numpy import save_file

from jaxsparse.analysis import cost
from jaxsparse.cli.convert_from_hf import open_path
from jaxsparse.config.errors import UserError
from jaxsparse.nn.memory.layer import MemoryLayer

FIXTURES = pathlib.Path(__file__).parents[1] / 'fixtures'
D, N, K, F, V = 32, 4, 2, 40, 50
H = D // N

MODEL = dict(
  d_model=D, n_heads=N, n_kv_heads=K, n_layers=2, mlp_hidden_size=2 * F,
  activation_type='swiglu', block_type='sequential', rope=True,
  layer_norm_type='rms', layer_norm_eps=1e-5, attention_layer_norm=True,
  layer_norm_with_affine=True, include_bias=False, weight_tying=False,
  vocab_size=48, embedding_size=V, max_sequence_length=64, init_fn='normal',
  init_std=0.02, precision=None, alibi=False, clip_qkv=None,
)  # fmt: skip
# In all of the official layers' fixtures.
MEMORY = dict(mem_knn=6, mem_kdim=8, mem_log_interval=50)
V1 = MEMORY | dict(
  mem_type='ultramem', mem_insert_way='0:1', mem_knum=12, mem_head=2,
  mem_vdim=16, mem_value_expand_time=4,
)  # fmt: skip
V2 = MEMORY | dict(
  mem_type='ultramem_v2', mem_insert_way='full', mem_knum=10, mem_head=1,
  mem_vdim=16, mem_pre_vdim=6, mem_share_ratio=0.5, mem_key_expand_time=2,
  n_layers=4,
)  # fmt: skip
PLUS = MEMORY | dict(
  mem_type='memory_plus', mem_insert_way='1:1', mem_knum=12, mem_head=2,
  mem_vdim=32,
)  # fmt: skip


def dense(num_layers=2, seed=0):
  """Random tensors of all but memory layers."""
  rng = np.random.default_rng(seed)
  found = {}

  def add(name, *shape, scale=0.3, mean=0.0):
    content = mean + scale * rng.normal(size=shape)
    found[f'transformer.{name}.weight'] = content.astype(np.float32)

  add('wte', V, D)
  add('ff_out', V, D)
  add('ln_f', D, scale=0.2, mean=1.0)
  for i in range(num_layers):
    at = f'blocks.{i}'
    add(f'{at}.att_proj', (N + 2 * K) * H, D)
    add(f'{at}.attn_out', D, D)
    add(f'{at}.ff_proj', 2 * F, D)
    add(f'{at}.ff_out', D, F)
    for name, width in (
      ('q_norm', H), ('k_norm', H), ('attn_norm', D), ('ff_norm', D)
    ):  # fmt: skip
      add(f'{at}.{name}', width, scale=0.2, mean=1.0)
  return found


def official(file, case):
  with np.load(FIXTURES / file) as content:
    return {
      name.removeprefix(f'{case}/'): content[name]
      for name in content.files
      if name.startswith(f'{case}/') and '/grad/' not in name
    }


def memory_tensors(arrays, layers):
  """An official layer's tensors as `layers`, numbers of memory layers."""
  found = {}
  for name, x in arrays.items():
    if name in ('cot', 'x', 'y', 'gx'):
      continue
    x = x.astype(np.int64 if name == 'shuffle_index' else np.float32)
    if name.startswith('full.'):
      of = name.removeprefix('full.')
      found[f'transformer.full_memory_layer.{of}'] = x
      continue
    found |= {f'transformer.mem_blocks.{j}.{name}': x for j in layers}
  return found


def write(folder, fields, tensors):
  folder.mkdir(exist_ok=True)
  # JSON is YAML.
  content = json.dumps(dict(model=MODEL | fields, run_name='x'))
  (folder / 'config.yaml').write_text(content)
  save_file(tensors, folder / 'model.safetensors')
  return folder


def rms(x, gain):
  return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * gain


def rotated(x):
  angle = np.arange(len(x))[:, None] / 1e4 ** (np.arange(0, H, 2) / H)
  cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
  a, b = np.split(x, 2, axis=-1)
  return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def oracle(tensors, tokens):
  w = {name: x.astype(np.float64) for name, x in tensors.items()}
  get = lambda name: w[f'transformer.{name}.weight']  # noqa: E731
  x = get('wte')[tokens]
  length = len(tokens)
  for i in range(2):
    at = f'blocks.{i}'
    h = rms(x, get(f'{at}.attn_norm'))
    qkv = (h @ get(f'{at}.att_proj').T).reshape(length, N + 2 * K, H)
    q, k, v = np.split(qkv, [N, N + K], axis=1)
    q = rotated(rms(q, get(f'{at}.q_norm')))
    k = rotated(rms(k, get(f'{at}.k_norm')))
    k, v = np.repeat(k, N // K, axis=1), np.repeat(v, N // K, axis=1)
    scores = np.einsum('tnh,snh->nts', q, k) / np.sqrt(H)
    scores = np.where(np.tri(length, dtype=bool), scores, -1e30)
    probs = np.exp(scores - scores.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    read = np.einsum('nts,snh->tnh', probs, v).reshape(length, D)
    x = x + read @ get(f'{at}.attn_out').T
    h = rms(x, get(f'{at}.ff_norm'))
    up, gate = np.split(h @ get(f'{at}.ff_proj').T, 2, axis=-1)
    x = x + (gate / (1 + np.exp(-gate)) * up) @ get(f'{at}.ff_out').T
  return rms(x, get('ln_f')) @ get('ff_out').T


def test_a_dense_model_is_its_own_function(tmp_path):
  tensors = dense()
  folder = write(tmp_path / 'a', {}, tensors)
  _, params, apply = loaded(open_path(folder))
  tokens = np.random.default_rng(1).integers(0, V, (1, 9)).astype(np.int32)
  found, wanted = apply(params, tokens)[0], oracle(tensors, tokens[0])
  scale = np.abs(wanted).max()
  np.testing.assert_allclose(found / scale, wanted / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
  ('fields', 'file', 'case', 'block', 'first_row'),
  [
    (V1, 'ultramem_v1.npz', 'v1_H2_E4', 0, 0),
    (V2, 'memory_family.npz', 'v2', 3, 300),
    (PLUS, 'memory_family.npz', 'memplus', 1, 0),
  ],
  ids=['ultramem', 'ultramem_v2', 'memory_plus'],
)
def test_memory_layers_are_the_official_ones(
  tmp_path, fields, file, case, block, first_row
):
  """With their own order of addresses, and the sign that was theirs."""
  arrays, num_layers = official(file, case), fields.get('n_layers', 2)
  layers = range(4) if fields is V2 else (0,)
  tensors = dense(num_layers) | memory_tensors(arrays, layers)
  folder = write(tmp_path / 'a', fields, tensors)
  module, params, _ = loaded(open_path(folder))
  counted = cost.count_parameters(module.config)
  assert counted.total == sum(x.size for x in jax.tree.leaves(params))
  memory = module.config.memory
  own = params[f'block_{block:02}']['memory']

  @jax.jit
  def read(own, tables, x):
    layer = MemoryLayer(memory, first_row=first_row)
    return layer.apply({'params': own}, x, tables=tables)[0]

  x = arrays['x'].astype(np.float32)
  found = read(own, params.get('memory'), x)
  scale = np.abs(arrays['y']).max()
  np.testing.assert_allclose(
    found / scale, arrays['y'] / scale, atol=2e-5, rtol=0
  )


def test_the_sign_of_directions_is_looked_at(tmp_path):
  """Half of the candidates are others where it is passed over."""
  arrays = official('ultramem_v1.npz', 'v1_H2_E4')
  tensors = dense() | memory_tensors(arrays, (0,))
  keys = 'transformer.mem_blocks.0.keys'
  first = open_path(write(tmp_path / 'a', V1, tensors)).source.read(keys)
  for side in 'uv':
    tensors[f'transformer.mem_blocks.0.tucker_core_{side}'] *= -1
  other = open_path(write(tmp_path / 'b', V1, tensors)).source.read(keys)
  np.testing.assert_array_equal(first, -other)


def test_it_can_be_trained_on(tmp_path):
  """The order of addresses is among the parameters, and has no gradient."""
  arrays = official('ultramem_v1.npz', 'v1_H2_E4')
  tensors = dense() | memory_tensors(arrays, (0,))
  folder = write(tmp_path / 'a', V1, tensors)
  module, params, _ = loaded(open_path(folder))
  tokens = jnp.arange(8)[None]

  @jax.jit
  @jax.grad
  def gradient(params):
    return (module.apply({'params': params}, tokens)[0] ** 2).mean()

  memory = gradient(params)['block_00']['memory']
  assert not np.any(memory['addresses'])
  assert np.any(memory['keys'])
  np.testing.assert_array_equal(
    params['block_00']['memory']['addresses'], arrays['shuffle_index']
  )


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    (dict(block_type='moe'), "block_type = 'moe'"),
    (dict(norm_after=True), 'norm_after = True'),
    (dict(layer_norm_type='default'), "layer_norm_type = 'default'"),
    (dict(clip_qkv=8.0), r'clip_qkv = 8\.0'),
    (dict(soft_cap=3), 'soft_cap = 3 .* unknown'),
    (V1 | dict(mem_type='hash'), "mem_type = 'hash'"),
    (V1 | dict(mem_insert_way='2-5'), "mem_insert_way = '2-5'"),
    (V1 | dict(mem_use_glu_act=True), 'mem_use_glu_act = True'),
    (V1, 'lacks mem_knum or mem_knn, or the checkpoint'),
  ],
)
def test_other_models_are_refused(tmp_path, fields, words):
  with pytest.raises(UserError, match=words):
    open_path(write(tmp_path / 'a', fields, dense()))


def test_damage_is_told(tmp_path):
  arrays = official('ultramem_v1.npz', 'v1_H2_E4')
  tensors = dense() | memory_tensors(arrays, (0,))
  tensors['transformer.mem_blocks.0.shuffle_index'][0] = 1
  tensors['transformer.mem_blocks.0.shuffle_index'][1] = 1
  opened = open_path(write(tmp_path / 'a', V1, tensors))
  with pytest.raises(UserError, match='is no order of its addresses'):
    opened.source.read('transformer.mem_blocks.0.shuffle_index')
  (tmp_path / 'a' / 'rank_0').mkdir()
  with pytest.raises(UserError, match='split over 1 ranks'):
    open_path(tmp_path / 'a')
