# SPDX-License-Identifier: Apache-2.0
"""OLMo 2: a Llama with norms on what attention and MLP add."""

from typing import Any

from jaxsparse.config import ModelConfig
from jaxsparse.config.model import block_name
from jaxsparse.interop.config_json import Fields
from jaxsparse.interop.families import llama
from jaxsparse.interop.layout import Layout

MODEL_TYPES = dict(olmo2='Olmo2ForCausalLM')
UNUSED, EMBEDDING, HEAD = llama.UNUSED, llama.EMBEDDING, llama.HEAD

# The first of these is the norm before the MLP in a Llama.
_NORMS = ('post_attention_layernorm', 'post_feedforward_layernorm')


def to_config(content: dict[str, Any]) -> ModelConfig:
  """The model of a config.json.

  Raises:
    UserError: a field is missing or not valid, or says what we do not have.
  """
  fields = Fields(content)
  found = llama.read_common(fields, 'olmo2')
  fields.expect('attention_bias', False)
  fields.finish()
  return ModelConfig(norm_placement='post', qk_norm='projection', **found)


def to_json(config: ModelConfig, kind: str) -> dict[str, Any]:
  """What `to_config` reads, as far as the family has it."""
  return llama.write_common(config, kind) | dict(attention_bias=False)


def layout(config: ModelConfig, kind: str) -> Layout:
  """Where the leaves lie."""
  del kind
  found = llama.outside(config)
  for i in range(config.num_layers):
    ours, theirs = block_name(i), f'model.layers.{i}'
    found |= llama.norms(config, ours, theirs, _NORMS)
    found |= llama.attention(config, ours, f'{theirs}.self_attn')
    found |= llama.mlp(config, ours, f'{theirs}.mlp')
  return found
