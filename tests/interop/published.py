# SPDX-License-Identifier: Apache-2.0
"""A published checkpoint of a Llama of one layer, with a tokenizer."""

import shutil

import numpy as np
from imported import HF
from parameters import draw

from jaxsparse.config import Config, DataConfig, ModelConfig
from jaxsparse.interop import exporting
from jaxsparse.nn.transformer import Transformer

MODEL = ModelConfig(
  num_layers=1,
  model_dim=32,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  mlp_dim=48,
  vocab_size=320,
)


def write_published(folder):
  """As the hub has it."""
  params = draw(Transformer(MODEL).init, np.zeros((1, 8), np.int32))['params']
  config = Config(model=MODEL, data=DataConfig(seq_len=64))
  exporting.write(params, exporting.form_of(config, {}, 'float32'), folder)
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    shutil.copyfile(HF / 'tokenizer' / name, folder / name)
