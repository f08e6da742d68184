# SPDX-License-Identifier: Apache-2.0
"""Damaged checkpoints, and those of other models, end in one sentence."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from commands import exit_code
from imported import HF
from safetensors.numpy import load_file, save_file

WHOLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
Q = 'model.layers.0.self_attn.q_proj.weight'
TABLE, HEAD = 'model.embed_tokens.weight', 'lm_head.weight'


def set_fields(**fields):
  """Changes fields of config.json; `...` takes one away."""

  def change(folder):
    path = folder / 'config.json'
    content = json.loads(path.read_text()) | fields
    content = {k: v for k, v in content.items() if v is not ...}
    path.write_text(json.dumps(content))

  return change


def set_tensors(make):
  """Changes the tensors by a function of their dictionary."""

  def change(folder):
    tensors = load_file(folder / WHOLE)
    make(tensors)
    save_file(tensors, folder / WHOLE)

  return change


def set_bytes(name, make):
  def change(folder):
    path = folder / name
    path.write_bytes(make(path.read_bytes()))

  return change


def set_index(make):
  def change(folder):
    path = folder / INDEX
    index = json.loads(path.read_text())
    make(index['weight_map'])
    path.write_text(json.dumps(index))

  return change


def as_pickle(folder):
  (folder / WHOLE).rename(folder / 'pytorch_model.bin')


def rope(**fields):
  return set_fields(rope_parameters=dict(rope_theta=1e4, **fields))


def gone(name):
  return lambda folder: (folder / name).unlink()


def untied(tensors):
  tensors[HEAD] = tensors[TABLE] + 1


# The checkpoint, what happens to it, and what the sentence must say.
CASES = {
  # The files.
  'no config': ('llama', gone('config.json'), 'has no config.json'),
  'no JSON': (
    'llama',
    set_bytes('config.json', lambda b: b[:40]),
    'is no JSON: it is cut off',
  ),
  'no text': (
    'llama',
    set_bytes('config.json', lambda b: b'\xff\xfe\x00'),
    'is no JSON',
  ),
  'no object': (
    'llama',
    set_bytes('config.json', lambda b: b'[1]'),
    'must hold a JSON object, got [1]',
  ),
  'no tensors': ('llama', gone(WHOLE), f'holds neither {WHOLE} nor'),
  'a pickle': ('llama', as_pickle, 'as pickles only (pytorch_model.bin)'),
  'cut off': (
    'llama',
    set_bytes(WHOLE, lambda b: b[:50_000]),
    "can't be read as safetensors",
  ),
  'cut off early': (
    'llama',
    set_bytes(WHOLE, lambda b: b[:5]),
    "can't be read as safetensors",
  ),
  'empty': (
    'llama',
    set_bytes(WHOLE, lambda b: b''),
    "can't be read as safetensors",
  ),
  'a page of the web': (
    'llama',
    set_bytes(WHOLE, lambda b: b'<html>No access</html>' * 9),
    "can't be read as safetensors",
  ),
  'a pointer of git': (
    'llama',
    set_bytes(WHOLE, lambda b: b'version https://git-lfs.github.com/spec/v1'),
    "can't be read as safetensors",
  ),
  'a missing shard': (
    'llama_sharded_bf16',
    gone('model-00002-of-00003.safetensors'),
    'names model-00002-of-00003.safetensors, but',
  ),
  'a shard cut off': (
    'llama_sharded_bf16',
    set_bytes('model-00002-of-00003.safetensors', lambda b: b[:9000]),
    "can't be read as safetensors",
  ),
  'an index of another name': (
    'llama_sharded_bf16',
    set_index(lambda names: names.update({TABLE: 'other.safetensors'})),
    'names other.safetensors, but',
  ),
  'an index that leads away': (
    'llama_sharded_bf16',
    set_index(lambda names: names.update({TABLE: '../llama/' + WHOLE})),
    'gives each tensor a file beside it',
  ),
  'an index of too much': (
    'llama_sharded_bf16',
    set_index(lambda names: names.update(more=names[TABLE])),
    'names tensors that no file',
  ),
  'an index of another file': (
    'llama_sharded_bf16',
    set_index(lambda names: names.update({TABLE: max(names.values())})),
    f'holds {TABLE}, which',
  ),
  'an index that is none': (
    'llama_sharded_bf16',
    set_bytes(INDEX, lambda b: b'{"weight_map": 3}'),
    'must be a JSON object whose weight_map',
  ),
  # The tensors.
  'a missing tensor': (
    'llama',
    set_tensors(lambda t: t.pop(Q)),
    f'the checkpoint lacks {Q}, so',
  ),
  'many missing tensors': (
    'llama',
    set_tensors(lambda t: [t.pop(n) for n in list(t) if 'mlp' in n]),
    'up_proj.weight and 1 more',
  ),
  'an extra tensor': (
    'llama',
    set_tensors(lambda t: t.update(more=t[Q])),
    'the checkpoint also holds more, so',
  ),
  'other names': (
    'llama',
    set_tensors(lambda t: t.update({Q + 's': t.pop(Q)})),
    f'lacks {Q} and also holds {Q}s, so',
  ),
  'biases that the config does not know': (
    'llama',
    set_tensors(lambda t: t.update({Q.replace('weight', 'bias'): t[Q][0]})),
    'q_proj.bias',
  ),
  'a wrong shape': (
    'llama',
    set_tensors(lambda t: t.update({Q: t[Q][:-1]})),
    f'{Q} must have the shape [32, 32] by the config, but has [31, 32]',
  ),
  'another vocabulary': (
    'llama',
    set_fields(vocab_size=97),
    f'{TABLE} must have the shape [97, 32]',
  ),
  'another head_dim': (
    'llama',
    set_fields(head_dim=16),
    f'{Q} must have the shape [64, 32]',
  ),
  'whole numbers': (
    'llama',
    set_tensors(lambda t: t.update({Q: t[Q].astype(np.int8)})),
    'is of I8: give the checkpoint that is not quantized',
  ),
  'eight bits': (
    'llama',
    set_tensors(lambda t: t.update({Q: t[Q].astype(ml_dtypes.float8_e4m3fn)})),
    'is of F8_E4M3: give the checkpoint that is not quantized',
  ),
  'no number': (
    'llama',
    set_tensors(lambda t: t[Q].fill(np.nan)),
    f'{Q} holds what is not a finite number',
  ),
  'infinity': (
    'mixtral',
    set_tensors(
      lambda t: t['model.layers.1.block_sparse_moe.experts.2.w1.weight'].fill(
        np.inf
      )
    ),
    'experts.2.w1.weight holds what is not a finite number',
  ),
  'a head that is not the tied table': (
    'qwen2',
    set_tensors(untied),
    f'{HEAD} differs from {TABLE}',
  ),
  # The config.
  'no model_type': ('llama', set_fields(model_type=...), 'model_type = None'),
  'a strange model_type': (
    'llama',
    set_fields(model_type=['llama']),
    "model_type = ['llama']",
  ),
  'a misspelt model_type': (
    'llama',
    set_fields(model_type='lama'),
    'does not know (did you mean llama?): it reads llama,',
  ),
  'gemma': (
    'llama',
    set_fields(model_type='gemma2'),
    'it lacks scaled embeddings, capped logits',
  ),
  'deepseek': (
    'llama',
    set_fields(model_type='deepseek_v3'),
    'it lacks latent attention',
  ),
  'quantized': (
    'llama',
    set_fields(quantization_config=dict(quant_method='awq', bits=4)),
    'quantization_config in config.json says that the weights are quantized',
  ),
  'a program beside it': (
    'llama',
    set_fields(auto_map=dict(AutoModelForCausalLM='m.Other')),
    'auto_map in config.json',
  ),
  'layers that are no number': (
    'llama',
    set_fields(num_hidden_layers=float('nan')),
    'num_hidden_layers in config.json must be a whole number of at least 1, '
    'got nan',
  ),
  'layers in words': (
    'llama',
    set_fields(num_hidden_layers='two'),
    "got 'two'",
  ),
  'no layers': ('llama', set_fields(num_hidden_layers=0), 'got 0'),
  'too many layers': (
    'llama',
    set_fields(num_hidden_layers=10**6),
    'num_layers must be at most 10,000',
  ),
  'true for a number': (
    'llama',
    set_fields(vocab_size=True),
    'vocab_size in config.json must be a whole number',
  ),
  'no width': (
    'llama',
    set_fields(hidden_size=...),
    'config.json lacks hidden_size',
  ),
  'an infinite epsilon': (
    'llama',
    set_fields(rms_norm_eps=float('inf')),
    'rms_norm_eps in config.json must be a number, got inf',
  ),
  'heads that do not group': (
    'llama',
    set_fields(num_key_value_heads=3),
    'describes a model that can not be: num_kv_heads must divide',
  ),
  'heads that do not divide': (
    'llama',
    set_fields(head_dim=None, num_attention_heads=5, num_key_value_heads=5),
    'hidden_size = 32 in config.json must be a multiple of '
    'num_attention_heads = 5',
  ),
  'another activation': (
    'llama',
    set_fields(hidden_act='relu'),
    "hidden_act = 'relu' in config.json changes the function",
  ),
  'another activation of GPT-NeoX': (
    'gpt_neox',
    set_fields(hidden_act='relu'),
    "hidden_act = 'relu' in config.json changes the function",
  ),
  'an unknown field': (
    'llama',
    set_fields(logit_scale=0.0625),
    'logit_scale = 0.0625 in config.json is unknown here',
  ),
  'biases in attention alone': (
    'llama',
    set_fields(attention_bias=True),
    'attention_bias = True and mlp_bias = False',
  ),
  'biases of Qwen3': (
    'qwen3',
    set_fields(attention_bias=True),
    'attention_bias = True in config.json changes the function',
  ),
  'no biases of GPT-NeoX': (
    'gpt_neox',
    set_fields(attention_bias=False),
    'attention_bias = False in config.json changes the function',
  ),
  'interleaved rotation': (
    'llama',
    set_fields(rope_interleaved=True),
    'rope_interleaved = True in config.json changes the function',
  ),
  'YaRN': (
    'llama',
    rope(rope_type='yarn', factor=4.0),
    "rope_type = 'yarn' in config.json is a scaling",
  ),
  'dynamic scaling of old': (
    'llama',
    set_fields(rope_scaling=dict(type='dynamic', factor=2.0)),
    "rope_type = 'dynamic' in config.json is a scaling",
  ),
  'a scaling without its factor': (
    'llama',
    rope(rope_type='linear'),
    'rope_parameters lacks factor',
  ),
  'a scaling with more': (
    'llama',
    rope(rope_type='linear', factor=2.0, attention_factor=0.5),
    'attention_factor = 0.5 in rope_parameters is unknown here',
  ),
  'two bases': (
    'llama',
    set_fields(rope_theta=500_000.0),
    'rope_theta is said more than once in config.json, and differently',
  ),
  'no base': (
    'qwen3',
    set_fields(rope_parameters=...),
    'config.json lacks rope_theta',
  ),
  'a base for each kind of layer': (
    'llama',
    set_fields(
      rope_parameters=dict(full_attention=dict(rope_theta=1e6)),
    ),
    'full_attention = ',
  ),
  'half of a Llama rotated': (
    'llama',
    rope(partial_rotary_factor=0.5),
    'partial_rotary_factor = 0.5 in config.json is not of this family',
  ),
  'an odd share': (
    'gpt_neox',
    rope(partial_rotary_factor=0.1),
    'rope_fraction must be above 0 and up to 1',
  ),
  'a window of a Llama': (
    'llama',
    set_fields(sliding_window=8),
    'sliding_window = 8 in config.json is unknown here',
  ),
  'a window that is not named': (
    'mistral',
    set_fields(sliding_window=...),
    'config.json lacks sliding_window',
  ),
  'a negative window': (
    'mistral',
    set_fields(sliding_window=-1),
    'sliding_window in config.json must be a whole number of at least 1',
  ),
  'a used window without its width': (
    'qwen2',
    set_fields(use_sliding_window=True),
    'config.json lacks sliding_window',
  ),
  'kinds of layers that are unknown': (
    'qwen3',
    set_fields(
      use_sliding_window=True,
      sliding_window=8,
      layer_types=['full_attention', 'chunked_attention'],
    ),
    'layer_types in config.json must hold full_attention or',
  ),
  'windows that are not used': (
    'qwen3',
    set_fields(layer_types=['full_attention', 'sliding_attention']),
    'does not fit use_sliding_window = False',
  ),
  'windows of Qwen3-MoE': (
    'qwen3_moe',
    set_fields(use_sliding_window=True, sliding_window=8),
    'use_sliding_window = True in config.json changes the function',
  ),
  'MLPs among experts': (
    'qwen3_moe',
    set_fields(mlp_only_layers=[0]),
    'mlp_only_layers = [0] in config.json changes the function',
  ),
  'experts in every second layer': (
    'qwen3_moe',
    set_fields(decoder_sparse_step=2),
    'decoder_sparse_step = 2 in config.json changes the function',
  ),
  'clipped queries': (
    'olmoe',
    set_fields(clip_qkv=8.0),
    'clip_qkv = 8.0 in config.json changes the function',
  ),
  'two numbers of experts': (
    'qwen3_moe',
    set_fields(num_experts=8),
    'num_experts or num_local_experts, and one number in both',
  ),
  'more experts used than there are': (
    'mixtral',
    set_fields(num_experts_per_tok=9),
    'num_experts_per_token must be at most num_experts = 4',
  ),
}


@pytest.mark.parametrize('name', CASES)
def test_one_sentence(name, tmp_path, capsys):
  fixture, change, said = CASES[name]
  folder, workdir = tmp_path / 'in', tmp_path / 'w'
  shutil.copytree(HF / fixture, folder, copy_function=shutil.copyfile)
  change(folder)
  argv = ['convert', 'from-hf', str(folder), f'--workdir={workdir}']
  assert exit_code(argv) == 2
  error = capsys.readouterr().err
  assert re.fullmatch(r'error: [^\n]+\.\n', error), error
  assert said in error
  assert not workdir.exists() or not [*workdir.iterdir()]


def test_there_is_no_such_folder(tmp_path, capsys):
  (tmp_path / 'file').touch()
  for path, said in (('none', 'there is no'), ('file', 'must be a folder')):
    argv = ['convert', 'from-hf', str(tmp_path / path), '--workdir=never']
    assert exit_code(argv) == 2
    assert said in capsys.readouterr().err


def test_a_workdir_that_is_in_use(tmp_path, capsys):
  (tmp_path / 'file').touch()
  argv = ['convert', 'from-hf', str(HF / 'llama'), f'--workdir={tmp_path}']
  assert exit_code(argv) == 2
  assert 'must be new or an empty folder' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('argv', 'said'),
  [
    (['from-fh', 'x'], "'from-fh' (did you mean from-hf?)"),
    (['from-hf'], 'the following arguments are required: path'),
    (['from-hf', 'x'], '--workdir'),
    (['from-hf', 'x', '--workdir=w', '--dtype=int8'], 'int8'),
    (['to-hf', 'x'], '--workdir'),
    (['to-hf', 'x', '--workdir=nowhere'], 'holds no config.json'),
  ],
)
def test_flags(argv, said, capsys):
  assert exit_code(['convert', *argv]) == 2
  error = capsys.readouterr().err
  assert re.fullmatch(r'error: [^\n]+\.\n', error), error
  assert said in error
