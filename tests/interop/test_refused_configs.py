# SPDX-License-Identifier: Apache-2.0
"""What a config.json says and we do not have, is refused by its name."""

import pytest
from changed import assert_refused, set_fields


def rope(**fields):
  return set_fields(rope_parameters=dict(rope_theta=1e4, **fields))


# The checkpoint, its config's change, and what the sentence must say.
CASES = {
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
  'kinds of layers that are lists': (
    'qwen3',
    set_fields(layer_types=[[]]),
    'layer_types = [[]] in config.json does not fit',
  ),
  'kinds of used layers that are lists': (
    'qwen3',
    set_fields(use_sliding_window=True, sliding_window=8, layer_types=[[], {}]),
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
  assert_refused(*CASES[name], tmp_path, capsys)
