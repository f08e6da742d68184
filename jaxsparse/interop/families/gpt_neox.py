# SPDX-License-Identifier: Apache-2.0
"""GPT-NeoX: Pythia. LayerNorm, biases, queries, keys and values in one."""

from typing import Any

from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import require, shown
from jaxsparse.config.model import block_name
from jaxsparse.interop import rope_json
from jaxsparse.interop.config_json import Fields
from jaxsparse.interop.layout import Layout, Leaf, Part, as_is, transposed

MODEL_TYPES = dict(gpt_neox='GPTNeoXForCausalLM')
# Masks and frequencies that old files hold.
UNUSED = (
  r'gpt_neox\.layers\.\d+\.attention\.'
  r'(bias|masked_bias|rotary_emb\.inv_freq)'
)
EMBEDDING, HEAD = 'gpt_neox.embed_in.weight', 'embed_out.weight'

# Those of the tanh form have many names.
_ACTIVATIONS = dict(
  gelu='gelu_erf', gelu_new='gelu', gelu_pytorch_tanh='gelu', gelu_fast='gelu'
)


def to_config(content: dict[str, Any]) -> ModelConfig:
  """The model of a config.json.

  Raises:
    UserError: a field is missing or not valid, or says what we do not have.
  """
  fields = Fields(content)
  dim, heads = (
    fields.take(name, int) for name in ('hidden_size', 'num_attention_heads')
  )
  require(
    dim % heads == 0,
    f'hidden_size = {dim} in config.json must be a multiple of '
    f'num_attention_heads = {heads}.',
  )
  activation = fields.take('hidden_act', str)
  require(
    activation in _ACTIVATIONS,
    f'hidden_act = {shown(activation)} in config.json changes the function in '
    f'a way that jaxsparse does not have: it reads {", ".join(_ACTIVATIONS)}.',
  )
  fields.expect('attention_bias', True)
  found = dict(
    num_layers=fields.take('num_hidden_layers', int),
    mlp_dim=fields.take('intermediate_size', int),
    vocab_size=fields.take('vocab_size', int),
    tie_embeddings=fields.take('tie_word_embeddings', bool, False),
    norm_epsilon=fields.take('layer_norm_eps', float),
    parallel_block=fields.take('use_parallel_residual', bool, True),
    **rope_json.read(fields, 10_000.0, has_share=True),
  )
  fields.finish()
  return ModelConfig(
    model_dim=dim,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=dim // heads,
    mlp=_ACTIVATIONS[activation],
    norm='layer',
    bias='all',
    **found,
  )


def to_json(config: ModelConfig, kind: str) -> dict[str, Any]:
  """What `to_config` reads, as far as the family has it."""
  del kind
  names = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
  return dict(
    num_hidden_layers=config.num_layers,
    hidden_size=config.model_dim,
    num_attention_heads=config.num_heads,
    intermediate_size=config.mlp_dim,
    vocab_size=config.vocab_size,
    tie_word_embeddings=config.tie_embeddings,
    layer_norm_eps=config.norm_epsilon,
    use_parallel_residual=config.parallel_block,
    hidden_act=names.get(config.mlp, config.mlp),
    attention_bias=True,
    **rope_json.write(config, has_share=True),
  )


def layout(config: ModelConfig, kind: str) -> Layout:
  """Where the leaves lie."""
  del kind
  dim, rows = config.model_dim, config.vocab_size
  found = {'embed/table': as_is(Part(EMBEDDING, (rows, dim)))}
  for i in range(config.num_layers):
    ours, theirs = block_name(i), f'gpt_neox.layers.{i}'
    found |= _norm(dim, f'{ours}/attention_norm', f'{theirs}.input_layernorm')
    found |= _norm(
      dim, f'{ours}/mlp_norm', f'{theirs}.post_attention_layernorm'
    )
    found |= _attention(config, f'{ours}/attention', f'{theirs}.attention')
    found |= _mlp(config, f'{ours}/mlp', f'{theirs}.mlp')
  found |= _norm(dim, 'final_norm', 'gpt_neox.final_layer_norm')
  if not config.tie_embeddings:
    found['output'] = as_is(Part(HEAD, (rows, dim)))
  return found


def _norm(dim: int, ours: str, theirs: str) -> Layout:
  return {
    f'{ours}/gain/scale': as_is(Part(f'{theirs}.weight', (dim,))),
    f'{ours}/bias': as_is(Part(f'{theirs}.bias', (dim,))),
  }


def _attention(config: ModelConfig, ours: str, theirs: str) -> Layout:
  dim, heads, width = config.model_dim, config.num_heads, config.head_dim
  whole, found = 3 * heads * width, {}
  for place, name in enumerate(('query', 'key', 'value')):
    # Queries, keys and values of one head stand together.
    weight = Part(
      f'{theirs}.query_key_value.weight',
      (whole, dim),
      (heads, 3, width, dim),
      (slice(None), place),
    )
    bias = Part(
      f'{theirs}.query_key_value.bias',
      (whole,),
      (heads, 3, width),
      (slice(None), place),
    )
    found[f'{ours}/{name}'] = Leaf(
      (weight,),
      lambda parts: parts[0].transpose(2, 0, 1),
      lambda leaf: [leaf.transpose(1, 2, 0)],
    )
    found[f'{ours}/{name}_bias'] = as_is(bias)
  dense = Part(f'{theirs}.dense.weight', (dim, heads * width))
  found[f'{ours}/output'] = transposed(dense, (heads, width, dim))
  found[f'{ours}/output_bias'] = as_is(Part(f'{theirs}.dense.bias', (dim,)))
  return found


def _mlp(config: ModelConfig, ours: str, theirs: str) -> Layout:
  dim, width = config.model_dim, config.mlp_dim
  names = dict(
    up=('dense_h_to_4h', width, dim), down=('dense_4h_to_h', dim, width)
  )
  found = {}
  for name, (tensor, out, inner) in names.items():
    weight = Part(f'{theirs}.{tensor}.weight', (out, inner))
    found[f'{ours}/{name}'] = transposed(weight)
    found[f'{ours}/{name}_bias'] = as_is(
      Part(f'{theirs}.{tensor}.bias', (out,))
    )
  return found
