# SPDX-License-Identifier: Apache-2.0
"""Exports are what transformers makes of them, where it is installed."""

import importlib.util

import jax
import numpy as np
import pytest
from parameters import draw

from jaxsparse.config import (
  Config,
  DataConfig,
  ModelConfig,
  MoEConfig,
  RopeScalingConfig,
)
from jaxsparse.interop import exporting
from jaxsparse.nn.transformer import Transformer

SMALL = dict(
  num_layers=2,
  model_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=48,
  vocab_size=40,
  rope_max_wavelength=500.0,
)
LOCAL = dict(attention_pattern=('local',), window=5)
MOE = MoEConfig(num_experts=4, num_experts_per_token=2, expert_dim=24)
UNEVEN = MoEConfig(
  num_experts=4,
  num_experts_per_token=2,
  expert_dim=24,
  normalize_weights=False,
)
NEOX = dict(
  num_kv_heads=4,
  norm='layer',
  bias='all',
  rope_fraction=0.5,
)
LLAMA3 = RopeScalingConfig(
  kind='llama3',
  factor=8.0,
  low_frequency_factor=1.0,
  high_frequency_factor=4.0,
  original_length=16,
)
MODELS = {
  'LlamaForCausalLM': [
    dict(),
    dict(tie_embeddings=False, bias='all'),
    dict(rope_scaling=LLAMA3),
    dict(rope_scaling=RopeScalingConfig(kind='linear', factor=2.0)),
  ],
  'MistralForCausalLM': [LOCAL, dict(num_heads=6, head_dim=4)],
  'Qwen2ForCausalLM': [
    dict(bias='qkv'),
    dict(bias='qkv', attention_pattern=('global', 'local'), window=5),
  ],
  'Qwen3ForCausalLM': [
    dict(qk_norm='head', head_dim=16),
    dict(qk_norm='head', tie_embeddings=False, **LOCAL),
  ],
  'Olmo2ForCausalLM': [dict(qk_norm='projection', norm_placement='post')],
  'MixtralForCausalLM': [
    dict(moe=MOE, mlp_dim=99),
    dict(moe=MOE, tie_embeddings=False, **LOCAL),
  ],
  'OlmoeForCausalLM': [dict(qk_norm='projection', moe=UNEVEN)],
  'Qwen3MoeForCausalLM': [
    dict(qk_norm='head', head_dim=16, moe=MOE),
    dict(qk_norm='head', moe=UNEVEN, tie_embeddings=False),
  ],
  'GPTNeoXForCausalLM': [
    dict(mlp='gelu_erf', parallel_block=True, tie_embeddings=False) | NEOX,
    dict(mlp='gelu') | NEOX,
  ],
}
CASES = [(name, fields) for name, of in MODELS.items() for fields in of]
TOKENS = np.random.default_rng(0).integers(0, 40, (2, 24), np.int32)


def export(fields, folder):
  """The form of a model with drawn parameters, and its logits here."""
  model = ModelConfig(**(SMALL | fields))
  params = draw(Transformer(model).init, TOKENS)['params']
  config = Config(model=model, data=DataConfig(seq_len=64))
  ids = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
  form = exporting.form_of(config, ids, 'float32')
  exporting.write(params, form, folder)
  apply = jax.jit(Transformer(model).apply)
  return form, np.asarray(apply({'params': params}, TOKENS)[0])


if importlib.util.find_spec('transformers'):

  @pytest.mark.slow
  @pytest.mark.parametrize(('name', 'fields'), CASES)
  def test_the_class_gives_our_logits(name, fields, tmp_path):
    import torch
    import transformers

    form, logits = export(fields, tmp_path / 'x')
    assert form.name == name
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / 'x', output_loading_info=True, attn_implementation='eager'
    )
    assert type(model).__name__ == name
    assert not any(info.values()), info
    with torch.no_grad():
      found = model(torch.from_numpy(TOKENS).long()).logits.numpy()
    difference = np.abs(found - logits).max()
    print(f'{name} {difference:.1e} of {np.abs(logits).max():.2f}')
    assert difference < 3e-5
