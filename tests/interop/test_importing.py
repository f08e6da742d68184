# SPDX-License-Identifier: Apache-2.0
"""Imported models are the functions that their official programs are."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import exit_code
from imported import (
  EXPERTS,
  HF,
  NAMES,
  expected,
  logits_of,
  open_fixture,
  params_of,
  read,
)
from lanes import few
from published import write_published

import jaxsparse
from jaxsparse import mesh
from jaxsparse.cli import convert_from_hf
from jaxsparse.interop.families import gpt_neox, llama, mixtral
from jaxsparse.nn.transformer import Transformer, init_cache
from jaxsparse.run import checkpoint, new_workdir


@pytest.mark.parametrize('name', NAMES)
def test_logits_are_the_official_ones(name, monkeypatch):
  _, logits = expected(name)
  found = logits_of(name, monkeypatch)
  np.testing.assert_allclose(found, logits, atol=3e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize('name', EXPERTS)
def test_logits_with_experts_as_they_run(name):
  _, logits = expected(name)
  np.testing.assert_allclose(logits_of(name), logits, atol=3e-5, rtol=0)


def test_sixteen_bits_differ_by_their_rounding_alone():
  exact, rounded = params_of('llama'), params_of('llama_sharded_bf16')
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x.astype(jnp.bfloat16), y),
    exact,
    rounded,
  )


def test_the_config_of_transformers_4_is_that_of_5(tmp_path):
  shutil.copy(HF / 'llama/config_legacy.json', tmp_path / 'config.json')
  shutil.copy(HF / 'llama/model.safetensors', tmp_path)
  legacy = convert_from_hf.open_path(tmp_path)
  now = open_fixture('llama')
  assert legacy.config == now.config
  assert legacy.length == now.length
  jax.tree.map(np.testing.assert_array_equal, read(legacy), params_of('llama'))


@pytest.mark.parametrize('name', few(['llama', 'mixtral'], NAMES))
def test_any_number_of_devices_gets_the_same(name):
  one, eight = params_of(name), params_of(name, 8)
  jax.tree.map(np.testing.assert_array_equal, one, eight)
  # Along the model's width, which all of these leaves have.
  table = eight['embed']['table']
  assert table.addressable_shards[0].data.size == table.size // 8
  up = eight['block_00']['moe' if name in EXPERTS else 'mlp']['up']
  assert up.addressable_shards[0].data.size == up.size // 8


@pytest.mark.parametrize('name', few(['llama'], NAMES))
def test_logits_on_eight_devices(name):
  tokens, logits = expected(name)
  # A sequence or more for each.
  tokens, logits = (np.repeat(a, 8, axis=0) for a in (tokens, logits))
  model = Transformer(open_fixture(name).config)
  with jax.set_mesh(mesh.make_mesh()):
    found = jax.jit(model.apply)({'params': params_of(name, 8)}, tokens)[0]
    np.testing.assert_allclose(found, logits, atol=3e-5, rtol=0)


@pytest.mark.parametrize('name', few(['mistral'], NAMES))
def test_decoding_with_a_cache_is_the_forward_pass(name):
  tokens, logits = expected(name)
  config = open_fixture(name).config
  num_prompt = tokens.shape[1] // 2
  params = jax.tree.map(np.asarray, params_of(name))
  cache = init_cache(config, len(tokens), tokens.shape[1])
  apply = jax.jit(Transformer(config).apply)
  found, begin = [], 0
  for end in (num_prompt, *range(num_prompt + 1, tokens.shape[1] + 1)):
    positions = jnp.broadcast_to(
      jnp.arange(begin, end), (len(tokens), end - begin)
    )
    part, cache, _ = apply(
      {'params': params},
      tokens[:, begin:end],
      positions,
      jnp.ones_like(positions),
      cache,
    )
    found.append(part)
    begin = end
  found = np.concatenate(found, axis=1)
  np.testing.assert_allclose(found, logits, atol=3e-5, rtol=0)


def test_a_workdir_holds_all_of_it(tmp_path, capsys):
  workdir = str(tmp_path / 'w')
  argv = ['convert', 'from-hf', str(HF / 'llama'), f'--workdir={workdir}']
  assert exit_code([*argv, '--dtype=bfloat16']) == 0
  said = capsys.readouterr().out
  assert said.startswith('llama: 2 blocks, width 32, 4 heads, vocabulary 96,')
  assert 'has no tokenizer' in said
  assert '26,272 parameters are in' in said
  module, params = jaxsparse.load(workdir)
  assert module.config.dtype == 'bfloat16'
  jax.tree.map(np.testing.assert_array_equal, params, params_of('llama'))
  origin = checkpoint.read_record(workdir)[new_workdir.ORIGIN]
  assert origin == dict(format='Hugging Face', family='llama', folder='llama')
  assert exit_code(['generate', f'--workdir={workdir}', '--prompt=x']) == 2
  assert 'holds no tokenizer' in capsys.readouterr().err


def test_nothing_is_left_of_an_import_that_fails(tmp_path, monkeypatch):
  def write(*_):
    raise KeyboardInterrupt

  folder, workdir = tmp_path / 'in', tmp_path / 'w'
  write_published(folder)
  monkeypatch.setattr(new_workdir, 'write', write)
  argv = ['convert', 'from-hf', str(folder), f'--workdir={workdir}']
  assert exit_code(argv) == 130
  assert not [*workdir.iterdir()]


WINDOWS = [
  ({}, 'global global global global'),
  (dict(use_sliding_window=False), 'global global global global'),
  (dict(max_window_layers=0), 'local local local local'),
  (dict(max_window_layers=2), 'global global local local'),
  (
    dict(layer_types=['sliding_attention', 'full_attention'] * 2),
    'local global local global',
  ),
]


@pytest.mark.parametrize(('given', 'blocks'), WINDOWS)
def test_windows_of_qwen(given, blocks):
  content = json.loads((HF / 'qwen2/config.json').read_text())
  del content['layer_types']
  content |= dict(num_hidden_layers=4, sliding_window=8)
  content |= dict(use_sliding_window=True) | given
  config = llama.to_config(content)
  assert config.attention_blocks == tuple(blocks.split())
  assert 'local' not in blocks or config.window == 8


def legacy_neox():
  content = json.loads((HF / 'gpt_neox/config.json').read_text())
  del content['rope_parameters']
  return content | dict(rotary_pct=0.25, rotary_emb_base=10_000)


def test_names_that_older_versions_wrote():
  assert gpt_neox.to_config(legacy_neox()) == open_fixture('gpt_neox').config
  content = json.loads((HF / 'qwen3_moe/config.json').read_text())
  content['num_experts'] = content.pop('num_local_experts')
  content['max_window_layers'] = 48
  assert mixtral.to_config(content) == open_fixture('qwen3_moe').config


@pytest.mark.parametrize(
  ('name', 'mlp'),
  [('gelu', 'gelu_erf'), ('gelu_new', 'gelu'), ('gelu_fast', 'gelu')],
)
def test_kinds_of_gelu(name, mlp):
  content = legacy_neox() | dict(hidden_act=name)
  assert gpt_neox.to_config(content).mlp == mlp


def test_old_files_hold_more_than_weights(tmp_path):
  from safetensors.numpy import load_file, save_file

  shutil.copy(HF / 'gpt_neox/config.json', tmp_path)
  tensors = load_file(HF / 'gpt_neox/model.safetensors')
  for i in range(2):
    layer = f'gpt_neox.layers.{i}.attention'
    tensors[f'{layer}.bias'] = np.ones((1, 1, 64, 64), bool)
    tensors[f'{layer}.masked_bias'] = np.array(-1e9, np.float32)
    tensors[f'{layer}.rotary_emb.inv_freq'] = np.ones(1, np.float16)
  save_file(tensors, tmp_path / 'model.safetensors')
  found = read(convert_from_hf.open_path(tmp_path))
  jax.tree.map(np.testing.assert_array_equal, found, params_of('gpt_neox'))


def test_a_tied_head_that_is_the_table(tmp_path):
  from safetensors.numpy import load_file, save_file

  shutil.copy(HF / 'qwen2/config.json', tmp_path)
  tensors = load_file(HF / 'qwen2/model.safetensors')
  tensors[llama.HEAD] = tensors[llama.EMBEDDING]
  save_file(tensors, tmp_path / 'model.safetensors')
  found = read(convert_from_hf.open_path(tmp_path))
  jax.tree.map(np.testing.assert_array_equal, found, params_of('qwen2'))
