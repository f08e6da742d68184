# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts with Llama's attention: Mixtral, OLMoE, Qwen3-MoE."""

from typing import Any

from jaxsparse.config import ModelConfig, MoEConfig
from jaxsparse.config.errors import require
from jaxsparse.config.model import block_name
from jaxsparse.interop import windows_json
from jaxsparse.interop.config_json import Fields
from jaxsparse.interop.families import llama
from jaxsparse.interop.layout import Layout, Part, stacked, transposed

MODEL_TYPES = dict(
  mixtral='MixtralForCausalLM',
  olmoe='OlmoeForCausalLM',
  qwen3_moe='Qwen3MoeForCausalLM',
)
UNUSED, EMBEDDING, HEAD = llama.UNUSED, llama.EMBEDDING, llama.HEAD

_QK_NORM = dict(mixtral='none', olmoe='projection', qwen3_moe='head')
# Names of an expert's matrices in Mixtral; the others name them as an MLP.
_NAMES = dict(gate='w1', up='w3', down='w2')


def to_config(content: dict[str, Any]) -> ModelConfig:
  """The model of a config.json.

  Raises:
    UserError: a field is missing or not valid, or says what we do not have.
  """
  fields, kind = Fields(content), content['model_type']
  found = llama.read_common(fields, kind)
  found['qk_norm'] = _QK_NORM[kind]
  if kind == 'mixtral':
    found |= windows_json.read_one(fields, found['num_layers'])
  else:
    fields.expect('attention_bias', False)
  if kind == 'olmoe':
    fields.expect('clip_qkv', None)
  if kind == 'qwen3_moe':
    fields.expect('decoder_sparse_step', 1)
    fields.expect('mlp_only_layers', [])
    # Versions of transformers differ in which blocks then have a window.
    fields.expect('use_sliding_window', False)
    fields.skip('sliding_window', 'max_window_layers')
  found['moe'] = _read_experts(fields, kind)
  fields.finish()
  return ModelConfig(**found)


def _read_experts(fields: Fields, kind: str) -> MoEConfig:
  is_mixtral = kind == 'mixtral'
  # transformers 5 writes the second where the hub's files have the first.
  names = ('num_experts', 'num_local_experts')
  counts = {fields.take(name, int, 0) for name in names} - {0}
  require(
    len(counts) == 1,
    f'config.json must have {" or ".join(names)}, and one number in both, but '
    f'has {sorted(counts) or "neither"}.',
  )
  (count,) = counts
  used = fields.take('num_experts_per_tok', int)
  width = 'moe_' * (kind == 'qwen3_moe') + 'intermediate_size'
  return MoEConfig(
    num_experts=count,
    num_experts_per_token=used,
    expert_dim=fields.take(width, int),
    normalize_weights=is_mixtral or fields.take('norm_topk_prob', bool),
    # Where all experts are used there is nothing to balance.
    **(dict(balance_loss_weight=0.0) if used == count else {}),
  )


def to_json(config: ModelConfig, kind: str) -> dict[str, Any] | None:
  """What `to_config` reads, as far as `kind` has it; None without experts."""
  moe = config.moe
  if not moe:
    return None
  found = llama.write_common(config, kind)
  found['num_experts_per_tok'] = moe.num_experts_per_token
  if kind != 'qwen3_moe':
    found['intermediate_size'] = moe.expert_dim
  if kind == 'mixtral':
    found |= windows_json.write_one(config)
    return found | dict(num_local_experts=moe.num_experts)
  found |= dict(
    num_experts=moe.num_experts,
    norm_topk_prob=moe.normalize_weights,
    attention_bias=False,
  )
  if kind == 'olmoe':
    return found | dict(clip_qkv=None)
  return found | dict(
    moe_intermediate_size=moe.expert_dim,
    decoder_sparse_step=1,
    mlp_only_layers=[],
    use_sliding_window=False,
    sliding_window=None,
  )


def layout(config: ModelConfig, kind: str) -> Layout:
  """Where the leaves lie; routers and experts are named by the family."""
  found = llama.outside(config)
  for i in range(config.num_layers):
    ours, theirs = block_name(i), f'model.layers.{i}'
    found |= llama.norms(config, ours, theirs)
    found |= llama.attention(config, ours, f'{theirs}.self_attn')
    found |= _experts(config, ours, theirs, kind)
  return found


def _experts(config: ModelConfig, ours: str, theirs: str, kind: str) -> Layout:
  is_mixtral = kind == 'mixtral'
  theirs += '.block_sparse_moe' if is_mixtral else '.mlp'
  dim, moe = config.model_dim, config.moe
  router = Part(f'{theirs}.gate.weight', (moe.num_experts, dim))
  found = {f'{ours}/moe/router': transposed(router)}
  for name in _NAMES:
    tensor = _NAMES[name] if is_mixtral else f'{name}_proj'
    shape = (moe.expert_dim, dim)
    shape = shape[::-1] if name == 'down' else shape
    found[f'{ours}/moe/{name}'] = stacked(
      [
        transposed(Part(f'{theirs}.experts.{e}.{tensor}.weight', shape))
        for e in range(moe.num_experts)
      ]
    )
  return found
