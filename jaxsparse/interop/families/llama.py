# SPDX-License-Identifier: Apache-2.0
"""Llama and what is built like it: Mistral, Qwen2, Qwen3; SmolLM2 is a Llama.

What `mixtral` and `olmo2` share with them is public.
"""

from typing import Any

from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import require
from jaxsparse.config.model import block_name
from jaxsparse.interop import rope_json, windows_json
from jaxsparse.interop.config_json import Fields
from jaxsparse.interop.layout import Layout, Part, as_is, transposed

# Each with the class of transformers that runs it.
MODEL_TYPES = dict(
  llama='LlamaForCausalLM',
  mistral='MistralForCausalLM',
  qwen2='Qwen2ForCausalLM',
  qwen3='Qwen3ForCausalLM',
)
# What old files hold besides weights.
UNUSED = r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq'

EMBEDDING, HEAD = 'model.embed_tokens.weight', 'lm_head.weight'


def to_config(content: dict[str, Any]) -> ModelConfig:
  """The model of a config.json.

  Raises:
    UserError: a field is missing or not valid, or says what we do not have.
  """
  fields, kind = Fields(content), content['model_type']
  found = read_common(fields, kind)
  if kind == 'mistral':
    found |= windows_json.read_one(fields, found['num_layers'])
  if kind in ('qwen2', 'qwen3'):
    found |= windows_json.read_by_layer(fields, found['num_layers'])
  if kind == 'qwen2':
    fields.expect('use_mrope', False)
    found['bias'] = 'qkv'
  if kind == 'qwen3':
    found['qk_norm'] = 'head'
  if kind == 'llama':
    fields.expect('rope_interleaved', False)
    found |= _biases(fields)
  elif kind == 'qwen3':
    fields.expect('attention_bias', False)
  fields.finish()
  return ModelConfig(**found)


def _biases(fields: Fields) -> dict[str, Any]:
  attention, mlp = (
    fields.take(name, bool, False) for name in ('attention_bias', 'mlp_bias')
  )
  require(
    attention == mlp,
    f'attention_bias = {attention} and mlp_bias = {mlp} in config.json must be '
    'the same: jaxsparse has biases in both or in none.',
  )
  return dict(bias='all') if attention else {}


def read_common(fields: Fields, kind: str) -> dict[str, Any]:
  """Fields of `ModelConfig` that all of these families have.

  Those that differ from one class of transformers to another where they are
  missing must be there.

  Raises:
    UserError: one is missing or not valid.
  """
  can_lack = kind in ('llama', 'olmo2', 'olmoe')
  dim, heads = (
    fields.take(name, int) for name in ('hidden_size', 'num_attention_heads')
  )
  if not can_lack:
    fields.require_named('num_key_value_heads')
  if kind == 'qwen3':
    head_dim = fields.take('head_dim', int)
  else:
    head_dim = fields.take('head_dim', int, 0)
  require(
    bool(head_dim) or dim % heads == 0,
    f'hidden_size = {dim} in config.json must be a multiple of '
    f'num_attention_heads = {heads}, as there is no head_dim.',
  )
  fields.expect('hidden_act', 'silu', 'swish')
  return dict(
    num_layers=fields.take('num_hidden_layers', int),
    model_dim=dim,
    num_heads=heads,
    num_kv_heads=fields.take('num_key_value_heads', int, heads),
    head_dim=head_dim or dim // heads,
    mlp_dim=fields.take('intermediate_size', int),
    vocab_size=fields.take('vocab_size', int),
    tie_embeddings=fields.take('tie_word_embeddings', bool, False),
    norm_epsilon=fields.take('rms_norm_eps', float),
    **rope_json.read(fields, 10_000.0 if can_lack else None),
  )


def to_json(config: ModelConfig, kind: str) -> dict[str, Any] | None:
  """What `to_config` reads, as far as `kind` has it."""
  found = write_common(config, kind)
  if kind == 'llama':
    # Its class refuses other widths, though it has head_dim.
    if config.model_dim % config.num_heads:
      return None
    has_bias = config.bias == 'all'
    return found | dict(attention_bias=has_bias, mlp_bias=has_bias)
  if kind == 'mistral':
    return found | windows_json.write_one(config)
  found |= windows_json.write_by_layer(config)
  return found | (dict(attention_bias=False) if kind == 'qwen3' else {})


def write_common(config: ModelConfig, kind: str) -> dict[str, Any]:
  """What `read_common` reads."""
  found = dict(
    hidden_size=config.model_dim,
    num_attention_heads=config.num_heads,
    num_key_value_heads=config.num_kv_heads,
    num_hidden_layers=config.num_layers,
    intermediate_size=config.mlp_dim,
    vocab_size=config.vocab_size,
    tie_word_embeddings=config.tie_embeddings,
    rms_norm_eps=config.norm_epsilon,
    hidden_act='silu',
    **rope_json.write(config),
  )
  # The classes of the others take it from the width.
  if kind not in ('qwen2', 'olmo2', 'olmoe'):
    found['head_dim'] = config.head_dim
  return found


def layout(config: ModelConfig, kind: str) -> Layout:
  """Where the leaves of a dense model lie."""
  del kind
  found = outside(config)
  for i in range(config.num_layers):
    ours, theirs = block_name(i), f'model.layers.{i}'
    found |= norms(config, ours, theirs)
    found |= attention(config, ours, f'{theirs}.self_attn')
    found |= mlp(config, ours, f'{theirs}.mlp')
  return found


def outside(config: ModelConfig) -> Layout:
  """Of the leaves that no block holds."""
  dim, rows = config.model_dim, config.vocab_size
  found = {
    'embed/table': as_is(Part(EMBEDDING, (rows, dim))),
    'final_norm/scale': as_is(Part('model.norm.weight', (dim,))),
  }
  if not config.tie_embeddings:
    found['output'] = as_is(Part(HEAD, (rows, dim)))
  return found


def norms(
  config: ModelConfig,
  ours: str,
  theirs: str,
  names: tuple[str, str] = ('input_layernorm', 'post_attention_layernorm'),
) -> Layout:
  """Of a block's two norms of the residual stream."""
  return {
    f'{ours}/{name}/scale': as_is(
      Part(f'{theirs}.{of}.weight', (config.model_dim,))
    )
    for name, of in zip(('attention_norm', 'mlp_norm'), names, strict=True)
  }


def attention(config: ModelConfig, ours: str, theirs: str) -> Layout:
  """Of a block's attention, with QK-norm and biases where there are any."""
  dim, width = config.model_dim, config.head_dim
  ours = f'{ours}/attention'
  found = {}
  heads = dict(
    query=config.num_heads, key=config.num_kv_heads, value=config.num_kv_heads
  )
  for name, num_heads in heads.items():
    tensor, inner = f'{theirs}.{name[0]}_proj', num_heads * width
    found[f'{ours}/{name}'] = transposed(
      Part(f'{tensor}.weight', (inner, dim)), (dim, num_heads, width)
    )
    if config.bias != 'none':
      found[f'{ours}/{name}_bias'] = as_is(
        Part(f'{tensor}.bias', (inner,)), (num_heads, width)
      )
  tensor, inner = f'{theirs}.o_proj', config.num_heads * width
  found[f'{ours}/output'] = transposed(
    Part(f'{tensor}.weight', (dim, inner)), (config.num_heads, width, dim)
  )
  if config.bias == 'all':
    found[f'{ours}/output_bias'] = as_is(Part(f'{tensor}.bias', (dim,)))
  for name in () if config.qk_norm == 'none' else ('query', 'key'):
    shape = (width,)
    if config.qk_norm == 'projection':
      shape = (heads[name], width)
    tensor = f'{theirs}.{name[0]}_norm.weight'
    size = shape[0] * (shape[1] if len(shape) > 1 else 1)
    found[f'{ours}/{name}_norm/scale'] = as_is(Part(tensor, (size,)), shape)
  return found


def mlp(config: ModelConfig, ours: str, theirs: str) -> Layout:
  """Of a block's MLP."""
  sizes = dict(
    gate=(config.mlp_dim, config.model_dim),
    up=(config.mlp_dim, config.model_dim),
    down=(config.model_dim, config.mlp_dim),
  )
  found = {}
  for name, shape in sizes.items():
    tensor = f'{theirs}.{name}_proj'
    found[f'{ours}/mlp/{name}'] = transposed(Part(f'{tensor}.weight', shape))
    if config.bias == 'all':
      found[f'{ours}/mlp/{name}_bias'] = as_is(
        Part(f'{tensor}.bias', shape[:1])
      )
  return found
