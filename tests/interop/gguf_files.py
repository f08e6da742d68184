# SPDX-License-Identifier: Apache-2.0
"""GGUF files in miniature, written as llama.cpp's converter writes them."""

import json

import gguf
import numpy as np
from imported import HF
from safetensors.numpy import load_file

TEMPLATE = '{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}'


def interleaved(weight, num_heads):
  """Rows of queries or keys in the order of llama.cpp's rotation."""
  rows = weight.reshape(num_heads, 2, -1, weight.shape[1])
  return rows.transpose(0, 2, 1, 3).reshape(weight.shape)


def write_llama(path, fixture='llama', metadata=(), tensors=(), tokens=True):
  """A fixture of Hugging Face as GGUF.

  Args:
    path: of the file.
    fixture: a Llama among the fixtures.
    metadata: pairs of key and value that are added, or replace others; of None
      there is none.
    tensors: pairs of name and content, likewise.
    tokens: whether there is a tokenizer.
  """
  config = json.loads((HF / fixture / 'config.json').read_text())
  heads, kv_heads = (
    config[f'num_{name}_heads'] for name in ('attention', 'key_value')
  )
  found = {
    'llama.block_count': config['num_hidden_layers'],
    'llama.context_length': config['max_position_embeddings'],
    'llama.embedding_length': config['hidden_size'],
    'llama.feed_forward_length': config['intermediate_size'],
    'llama.attention.head_count': heads,
    'llama.attention.head_count_kv': kv_heads,
    'llama.attention.key_length': config['head_dim'],
    'llama.attention.value_length': config['head_dim'],
    'llama.attention.layer_norm_rms_epsilon': config['rms_norm_eps'],
    'llama.rope.freq_base': config['rope_parameters']['rope_theta'],
    'llama.rope.dimension_count': config['head_dim'],
    'llama.vocab_size': config['vocab_size'],
  }
  if tokens:
    found |= tokenizer_metadata(config['vocab_size'])
  weights = load_file(HF / fixture / 'model.safetensors')
  content = dict(
    _renamed(name, weight, heads, kv_heads) for name, weight in weights.items()
  )
  _write(path, found | dict(metadata), content | dict(tensors))
  return path


def tokenizer_metadata(vocab_size):
  """Single letters, one merge, three markers and a word of a user."""
  letters = [chr(i) for i in range(33, 127)][: vocab_size - 6]
  markers = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', 'WORD']
  tokens = [*markers, *letters, 'Ġ', 'he']
  return {
    'tokenizer.ggml.model': 'gpt2',
    'tokenizer.ggml.pre': 'smollm',
    'tokenizer.ggml.tokens': tokens,
    'tokenizer.ggml.token_type': [3, 3, 3, 4] + [1] * (len(tokens) - 4),
    'tokenizer.ggml.merges': ['h e'],
    'tokenizer.ggml.bos_token_id': 1,
    'tokenizer.ggml.eos_token_id': 2,
    'tokenizer.ggml.add_bos_token': False,
    'tokenizer.chat_template': TEMPLATE,
  }


_NAMES = {
  'input_layernorm': 'attn_norm',
  'post_attention_layernorm': 'ffn_norm',
  'q_proj': 'attn_q',
  'k_proj': 'attn_k',
  'v_proj': 'attn_v',
  'o_proj': 'attn_output',
  'gate_proj': 'ffn_gate',
  'up_proj': 'ffn_up',
  'down_proj': 'ffn_down',
}
_OUTSIDE = {
  'model.embed_tokens.weight': 'token_embd.weight',
  'model.norm.weight': 'output_norm.weight',
  'lm_head.weight': 'output.weight',
}


def _renamed(name, weight, heads, kv_heads):
  if name in _OUTSIDE:
    return _OUTSIDE[name], weight
  _, _, block, *_, kind, _ = name.split('.')
  if kind in ('q_proj', 'k_proj'):
    weight = interleaved(weight, heads if kind == 'q_proj' else kv_heads)
  return f'blk.{block}.{_NAMES[kind]}.weight', weight


def _write(path, metadata, tensors, architecture='llama'):
  writer = gguf.GGUFWriter(path, metadata.pop('architecture', architecture))
  for name, value in metadata.items():
    if isinstance(value, bool):
      writer.add_bool(name, value)
    elif isinstance(value, int):
      writer.add_uint32(name, value)
    elif isinstance(value, float):
      writer.add_float32(name, value)
    elif isinstance(value, str):
      writer.add_string(name, value)
    elif value is not None:
      writer.add_array(name, value)
  for name, content in tensors.items():
    if content is None:
      continue
    raw, kind = content if isinstance(content, tuple) else (content, None)
    writer.add_tensor(name, np.ascontiguousarray(raw), raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def write_tensors(path, tensors):
  """A file with tensors, pairs of bytes [rows, n] and kind, and no model."""
  _write(path, {}, tensors)
