# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints in miniature, and what an import of them gives."""

import functools
import pathlib

import jax
import numpy as np

from jaxsparse import mesh
from jaxsparse.cli import convert_from_hf
from jaxsparse.interop import importing
from jaxsparse.nn import experts
from jaxsparse.nn.transformer import Transformer
from jaxsparse.ops.experts.expert_mlp import expert_mlp_reference
from jaxsparse.run.progress import Reporter

HF = pathlib.Path(__file__).parents[1] / 'fixtures' / 'hf'
NAMES = (
  'llama',
  'llama_sharded_bf16',
  'llama3_rope',
  'mistral',
  'qwen2',
  'qwen3',
  'olmo2',
  'mixtral',
  'olmoe',
  'qwen3_moe',
  'gpt_neox',
)
EXPERTS = ('mixtral', 'olmoe', 'qwen3_moe')


@functools.cache
def open_fixture(name):
  return convert_from_hf.open_path(HF / name)


def expected(name):
  """Token ids [B, T], and logits [B, T, V] of the official model in float64."""
  with np.load(HF / name / 'logits.npz') as content:
    return content['input_ids'], content['logits_f64']


@functools.cache
def params_of(name, num_devices=1):
  return read(open_fixture(name), num_devices)


def read(opened, num_devices=1):
  """Parameters that an import gives, before they are saved."""
  devices = mesh.make_mesh(devices=jax.devices()[:num_devices])
  silent = Reporter(is_silent=True)
  return importing.read_params(
    opened.source, opened.layout, opened.config, devices, silent
  )


def plainly_mixed(x, weights, experts, matrices, **_):
  """All experts on all tokens: the program that is compiled soonest."""
  flat = (a.reshape(-1, a.shape[-1]) for a in (x, weights, experts))
  return expert_mlp_reference(*flat, matrices).reshape(x.shape)


def logits_of(name, monkeypatch=None):
  """Of the fixture's tokens; with a monkeypatch experts run plainly."""
  # One device, and no mesh.
  params = jax.tree.map(np.asarray, params_of(name))
  if monkeypatch:
    monkeypatch.setattr(experts, 'sharded_expert_mlp', plainly_mixed)
  model = Transformer(open_fixture(name).config)
  tokens, _ = expected(name)
  return jax.jit(model.apply)({'params': params}, tokens)[0]
