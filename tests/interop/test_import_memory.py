# SPDX-License-Identifier: Apache-2.0
"""An import takes little more memory than the parameters that it makes."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from imported import HF
from safetensors.numpy import save_file

ROOT = pathlib.Path(__file__).parents[2]
LAYERS, D, F, V = 4, 1024, 2816, 6144
# Parameters that are written at one time, compressed and not.
CONSTANT = 128 * 2**20

IMPORT = """
import sys
from jaxsparse.cli import convert_from_hf

def memory(key):
  for line in open('/proc/self/status'):
    if line.startswith(key):
      return int(line.split()[1]) * 1024

small, large, folder = sys.argv[1:]
# What libraries and programs take, whatever is imported.
convert_from_hf.main([small, f'--workdir={folder}/small'])
before = memory('VmRSS')
open('/proc/self/clear_refs', 'w').write('5')
convert_from_hf.main([large, f'--workdir={folder}/large'])
print(memory('VmHWM') - before)
"""


def write_llama(folder):
  """A Llama of 240 MB in float32; returns its size in bytes."""
  rng = np.random.default_rng(0)

  def draw(*shape):
    return rng.standard_normal(shape, np.float32)

  tensors = {
    'model.embed_tokens.weight': draw(V, D),
    'lm_head.weight': draw(V, D),
    'model.norm.weight': draw(D),
  }
  for i in range(LAYERS):
    layer = f'model.layers.{i}'
    for norm in ('input_layernorm', 'post_attention_layernorm'):
      tensors[f'{layer}.{norm}.weight'] = draw(D)
    for name in 'qkvo':
      tensors[f'{layer}.self_attn.{name}_proj.weight'] = draw(D, D)
    for name in ('gate', 'up'):
      tensors[f'{layer}.mlp.{name}_proj.weight'] = draw(F, D)
    tensors[f'{layer}.mlp.down_proj.weight'] = draw(D, F)
  folder.mkdir()
  save_file(tensors, folder / 'model.safetensors')
  config = json.loads((HF / 'llama/config.json').read_text()) | dict(
    head_dim=D // 4,
    num_key_value_heads=4,
    num_hidden_layers=LAYERS,
    hidden_size=D,
    intermediate_size=F,
    vocab_size=V,
  )
  (folder / 'config.json').write_text(json.dumps(config))
  return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.slow
def test_peak_of_an_import(tmp_path):
  size = write_llama(tmp_path / 'in')
  assert size > 200 * 10**6
  done = subprocess.run(
    [sys.executable, '-c', IMPORT, HF / 'llama', tmp_path / 'in', tmp_path],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  peak = int(done.stdout.splitlines()[-1])
  print(f'{peak / 2**20:.0f} MiB for {size / 2**20:.0f} MiB of parameters')
  assert size < peak < 1.3 * size + CONSTANT
