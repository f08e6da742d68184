# SPDX-License-Identifier: Apache-2.0
"""A folder of the trainer that UltraMem and UltraMemV2 were published with."""

import math
import pathlib
from typing import Any

from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import require
from jaxsparse.config.model import block_name
from jaxsparse.interop import ultramem_layers, yaml_file
from jaxsparse.interop.config_json import Fields
from jaxsparse.interop.importing import Opened
from jaxsparse.interop.layout import Layout, Part, as_is, transposed
from jaxsparse.interop.source import SafetensorsSource, Source

CONFIG = 'config.yaml'

_EMBEDDING, _HEAD = 'transformer.wte.weight', 'transformer.ff_out.weight'

# Of `model` in config.yaml, what does not change the function.
_HARMLESS = """
  attention_dropout block_group_size emb_init_std embedding_dropout
  embedding_size eos_token_id flash_attention fused_dense init_cutoff_factor
  init_device init_fn init_std mem_log_interval mem_parallel_size
  mem_gradient_accumulation mem_value_dropout mlp_ratio new_style_checkpoints
  pad_token_id precision residual_dropout rope_full_precision
  scale_emb_init vocab_size
"""
# And what must be this; a field that is missing is the first.
_EXPECTED: dict[str, tuple[Any, ...]] = dict(
  block_type=('sequential',),
  activation_type=('swiglu',),
  layer_norm_type=('rms',),
  layer_norm_with_affine=(True,),
  attention_layer_norm_with_affine=(True,),
  bias_for_layer_norm=(False,),
  include_bias=(False,),
  embedding_layer_norm=(False,),
  norm_after=(False,),
  scale_logits=(False,),
  alibi=(False,),
  alibi_bias_max=(8.0,),
  rope=(True,),
  clip_qkv=(None,),
  multi_query_attention=(False,),
)


def open_folder(folder: pathlib.Path) -> Opened:
  """Reads what config.yaml and model.safetensors say.

  Raises:
    UserError: they are damaged, or of a model that we do not have.
  """
  content = yaml_file.read(folder / CONFIG).get('model')
  require(
    isinstance(content, dict),
    f'{CONFIG} in {str(folder)!r} must have a mapping named model: give the '
    "folder of a checkpoint of UltraMem's trainer.",
  )
  parts = sorted(p.name for p in folder.glob('rank_*') if p.is_dir())
  require(
    not parts,
    f'{str(folder)!r} is split over {len(parts)} ranks: save it unsharded, or '
    'concatenate the tables of the ranks along axis 1.',
  )
  source = SafetensorsSource(folder)
  config, length = _config(content, source)
  layout = _layout(config)
  if config.memory:
    source, leaves = ultramem_layers.adapted(source, config)
    layout |= leaves
  return Opened(
    source=source,
    layout=layout,
    config=config,
    length=length,
    family=content.get('mem_type') or 'olmo',
    origin=dict(format='UltraMem trainer', folder=folder.name),
    write_tokenizer=lambda workdir: (
      'The trainer keeps no tokenizer beside a checkpoint: the model reads ids '
      'of tokens only.'
    ),
  )


def _config(content: dict[str, Any], source: Source) -> tuple[ModelConfig, int]:
  fields = Fields(content, CONFIG)
  for name, values in _EXPECTED.items():
    fields.expect(name, *values)
  fields.skip(*_HARMLESS.split())
  fields.skip(*(name for name in content if name.startswith('moe_')))
  shapes = {name: source.shape(name) for name in source.names()}
  table = shapes.get(_EMBEDDING, ())
  dim, heads = fields.take('d_model', int), fields.take('n_heads', int)
  require(
    len(table) == 2 and dim % heads == 0,
    f'the checkpoint lacks {_EMBEDDING}, or d_model = {dim} in {CONFIG} is no '
    f'multiple of n_heads = {heads}.',
  )
  width, layers = dim // heads, fields.take('n_layers', int)
  gain = shapes.get('transformer.blocks.0.q_norm.weight', (width,))
  found: dict[str, Any] = {}
  if fields.take('attention_layer_norm', bool, False):
    kind = 'head' if gain == (width,) else 'projection'
    found['qk_norm'] = kind
  inner = fields.take('mlp_hidden_size', int)
  memory = ultramem_layers.to_config(fields, shapes, layers)
  config = ModelConfig(
    num_layers=layers,
    model_dim=dim,
    num_heads=heads,
    num_kv_heads=fields.take('n_kv_heads', int, heads),
    head_dim=width,
    # Up and gate together.
    mlp_dim=inner // 2,
    vocab_size=table[0],
    tie_embeddings=fields.take('weight_tying', bool, True),
    norm_epsilon=fields.take('layer_norm_eps', float, 1e-5),
    rope_max_wavelength=fields.take('rope_theta', float, 10_000.0),
    memory=memory,
    **found,
  )
  length = fields.take('max_sequence_length', int, 2048)
  fields.finish()
  return config, length


def _layout(config: ModelConfig) -> Layout:
  """Of all but memory layers."""
  dim, rows = config.model_dim, config.vocab_size
  found = {
    'embed/table': as_is(Part(_EMBEDDING, (rows, dim))),
    'final_norm/scale': as_is(Part('transformer.ln_f.weight', (dim,))),
  }
  if not config.tie_embeddings:
    found['output'] = as_is(Part(_HEAD, (rows, dim)))
  for i in range(config.num_layers):
    ours, theirs = block_name(i), f'transformer.blocks.{i}'
    for name, of in (('attention_norm', 'attn_norm'), ('mlp_norm', 'ff_norm')):
      part = Part(f'{theirs}.{of}.weight', (dim,))
      found[f'{ours}/{name}/scale'] = as_is(part)
    found |= _attention(config, f'{ours}/attention', theirs)
    inner = config.mlp_dim
    # Up before gate.
    for place, name in enumerate(('up', 'gate')):
      part = Part(
        f'{theirs}.ff_proj.weight', (2 * inner, dim), (2, inner, dim), (place,)
      )
      found[f'{ours}/mlp/{name}'] = transposed(part)
    down = Part(f'{theirs}.ff_out.weight', (dim, inner))
    found[f'{ours}/mlp/down'] = transposed(down)
  return found


def _attention(config: ModelConfig, ours: str, theirs: str) -> Layout:
  dim, width = config.model_dim, config.head_dim
  counts = dict(
    query=config.num_heads, key=config.num_kv_heads, value=config.num_kv_heads
  )
  rows, begin, found = sum(counts.values()) * width, 0, {}
  for name, count in counts.items():
    end = begin + count * width
    part = Part(
      f'{theirs}.att_proj.weight', (rows, dim), index=(slice(begin, end),)
    )
    found[f'{ours}/{name}'] = transposed(part, (dim, count, width))
    begin = end
  out = Part(f'{theirs}.attn_out.weight', (dim, counts['query'] * width))
  found[f'{ours}/output'] = transposed(out, (counts['query'], width, dim))
  for name in () if config.qk_norm == 'none' else ('query', 'key'):
    shape = (width,)
    if config.qk_norm == 'projection':
      shape = (counts[name], width)
    part = Part(f'{theirs}.{name[0]}_norm.weight', (math.prod(shape),))
    found[f'{ours}/{name}_norm/scale'] = as_is(part, shape)
  return found
