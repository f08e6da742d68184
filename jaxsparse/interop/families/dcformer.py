# SPDX-License-Identifier: Apache-2.0
"""DCFormer-2.8B and DCPythia-6.9B (arXiv:2405.08553): composed heads.

Their config.json names a program beside it; the weights need none.
"""

import dataclasses
from typing import Any

import numpy as np

from jaxsparse.config import DCMHAConfig, ModelConfig
from jaxsparse.config.errors import require, shown
from jaxsparse.config.model import block_name
from jaxsparse.interop.config_json import Fields
from jaxsparse.interop.layout import Layout, Leaf, Part, as_is, transposed
from jaxsparse.interop.source import Replaced, Source, Without

MODEL_TYPES = dict(dcformer='DCFormer', dcpythia='DCPythia')
# Nothing of transformers: its program is beside it, and there is no way out.
IS_PROGRAM = True
UNUSED, EMBEDDING, HEAD = '', 'tok_embeddings.weight', 'output.weight'
LENGTH = 'block_size'

# Kinds of the first blocks, which repeat.
_PATTERNS = dict(
  LG=('local', 'global'),
  LGLL=('local', 'global', 'local', 'local'),
  LGL6=('local', 'global', *('local',) * 6),
)
# In the program, of all patterns with a name.
_WINDOW = 256


def to_config(content: dict[str, Any]) -> ModelConfig:
  """The model of a config.json.

  Raises:
    UserError: a field is missing or not valid, or says what we do not have.
  """
  fields, is_pythia = Fields(content), content['model_type'] == 'dcpythia'
  dim, heads = (fields.take(name, int) for name in ('dim', 'n_head'))
  require(
    dim % heads == 0 and heads % 2 == 0,
    f'dim = {dim} in config.json must be a multiple of n_head = {heads}, an '
    'even number.',
  )
  # Of other numbers of heads there is no way to compose them.
  fields.expect('n_local_heads', heads, -1)
  fields.expect('use_dcmha', True)
  fields.expect('query_wise', False)
  fields.expect('tie_word_embeddings', False)
  fields.skip(
    'auto_map',
    'head_dim',
    'is_training',
    'q_chunk_size',
    'use_gradient_checkpointing',
    'prefill_pad',
    LENGTH,
  )
  found = dict(
    num_layers=fields.take('n_layer', int),
    vocab_size=fields.take('vocab_size', int),
    mlp_dim=fields.take('intermediate_size', int),
    norm_epsilon=fields.take('norm_eps', float, 1e-5),
    rope_max_wavelength=fields.take('rope_base', float),
    **_windows(fields),
  )
  if fields.take('use_qk_norm', bool, False):
    found |= dict(qk_norm='head', qk_norm_epsilon=1e-6)
  if is_pythia:
    has_bias = fields.take('use_linear_bias', bool, True)
    require(
      has_bias,
      'use_linear_bias = False in config.json is a model that jaxsparse does '
      'not have: norms with biases beside maps without.',
    )
    found |= dict(
      mlp='gelu_erf',
      norm='layer',
      bias='all',
      parallel_block=fields.take('use_parallel_residual', bool, True),
      rope_fraction=fields.take('rotary_pct', float, 0.25),
    )
  else:
    # A gate of the MLP, which a later model has.
    fields.expect('mgate', False)
    fields.skip('mgate_dim')
  fields.finish()
  return ModelConfig(
    model_dim=dim,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=dim // heads,
    tie_embeddings=False,
    dcmha=DCMHAConfig(gelu='erf'),
    **found,
  )


def _windows(fields: Fields) -> dict[str, Any]:
  """Of the blocks by turns; the window counts the token itself.

  The programs differ by one token; the weights were trained with this one.
  """
  kind = fields.take('window_type', str, 'LG')
  window = fields.take('window_size', int, 0)
  require(
    kind in _PATTERNS,
    f'window_type = {shown(kind)} in config.json is a pattern that is not '
    f'known: {", ".join(_PATTERNS)} are.',
  )
  if not window:
    return {}
  fields_given = fields.take('window_type', str, '')
  require(
    not fields_given or window == _WINDOW,
    f'window_size = {window} in config.json must be {_WINDOW} beside '
    f'window_type = {fields_given!r}, which is of that size.',
  )
  return dict(attention_pattern=_PATTERNS[kind], window=window)


def prepare(
  source: Source, config: ModelConfig
) -> tuple[Source, ModelConfig, list[str]]:
  """The weights without their copies, and what was found on the way.

  Training in PyTorch goes on with merged copies of a generator's maps, and
  leaves the maps as they were: where they differ the copy is right.

  Raises:
    UserError: blocks differ in what they have.
  """
  names, replaced, notes = set(source.names()), {}, []
  dropped: set[str] = set()
  for i in range(config.num_layers):
    at = f'layers.{i}.attention.dyn_w_proj'
    copies = {'dw_m': _merged, 'qkw_m': lambda read, at: read(f'{at}.qkw')}
    for copy, merged in copies.items():
      name = f'{at}.{copy}'
      if name not in names:
        continue
      dropped.add(name)
      content = source.read(name)
      original = merged(source.read, at)
      require(
        content.size == original.size,
        f'{name} must have {original.size} numbers, as what it is a copy of, '
        f'but has {content.size}.',
      )
      if not np.array_equal(content.ravel(), original.ravel()):
        replaced |= _parted(copy, content, config, at)
        notes.append(name)
  static = _static(source, config, names)
  dropped |= {n for n in names if n.endswith('.dyn_w_proj.sw')}
  if not static:
    dropped |= {n for n in names if n.endswith('_proj.w')}
  told = []
  if notes:
    told.append(
      f'{len(notes)} merged maps differ from those that they are made of, as '
      f'after training in PyTorch: the merged ones are taken ({notes[0]} ...).'
    )
  left = Without(source, lambda name: name in dropped)
  dcmha = dataclasses.replace(config.dcmha, base=static)
  config = dataclasses.replace(config, dcmha=dcmha)
  return Replaced(left, replaced), config, told


def _merged(read, at: str) -> np.ndarray:
  hidden, gate = read(f'{at}.dw1'), read(f'{at}.dd')
  rows = len(hidden)
  return np.concatenate([hidden.reshape(rows, -1), gate.reshape(rows, -1)], 1)


def _parted(
  copy: str, content: np.ndarray, config: ModelConfig, at: str
) -> dict[str, np.ndarray]:
  shapes = _generator(config)
  if copy == 'qkw_m':
    return {f'{at}.qkw': content.reshape(shapes['qkw'])}
  width = int(np.prod(shapes['dw1'][1:]))
  return {
    f'{at}.dw1': content[:, :width].reshape(shapes['dw1']),
    f'{at}.dd': content[:, width:].reshape(shapes['dd']),
  }


def _static(source: Source, config: ModelConfig, names: set[str]) -> bool:
  """Whether there are static maps; without them their places hold identity."""
  found = [
    not np.array_equal(source.read(name)[0], np.eye(config.num_heads))
    for name in sorted(names)
    if name.endswith(('.pre_proj.w', '.post_proj.w'))
  ]
  require(
    len(set(found)) <= 1,
    'some pre_proj.w and post_proj.w are the identity, as without a static '
    'map, and others are not: the checkpoint is damaged, so fetch it again.',
  )
  return any(found)


def _generator(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  dim, heads, twice = config.model_dim, config.num_heads, 2 * config.dcmha.rank
  return dict(
    dw1=(dim, 1, 4, twice * heads),
    qkw=(1, 4, twice * heads, twice, heads),
    dd=(dim, 1, 4 * heads),
  )


def layout(config: ModelConfig, kind: str) -> Layout:
  """Where the leaves lie."""
  dim, rows = config.model_dim, config.vocab_size
  found = {
    'embed/table': as_is(Part(EMBEDDING, (rows, dim))),
    'output': as_is(Part(HEAD, (rows, dim))),
  }
  found |= _norm(config, 'final_norm', 'norm')
  for i in range(config.num_layers):
    ours, theirs = block_name(i), f'layers.{i}'
    found |= _norm(config, f'{ours}/attention_norm', f'{theirs}.attention_norm')
    found |= _norm(config, f'{ours}/mlp_norm', f'{theirs}.ffn_norm')
    found |= _attention(config, f'{ours}/attention', f'{theirs}.attention')
    found |= _mlp(config, f'{ours}/mlp', f'{theirs}.feed_forward', kind)
  return found


def _norm(config: ModelConfig, ours: str, theirs: str) -> Layout:
  weight = as_is(Part(f'{theirs}.weight', (config.model_dim,)))
  if config.norm != 'layer':
    return {f'{ours}/scale': weight}
  bias = as_is(Part(f'{theirs}.bias', (config.model_dim,)))
  return {f'{ours}/gain/scale': weight, f'{ours}/bias': bias}


def _attention(config: ModelConfig, ours: str, theirs: str) -> Layout:
  dim, heads, width = config.model_dim, config.num_heads, config.head_dim
  rows, found = 3 * heads * width, {}
  for place, name in enumerate(('query', 'key', 'value')):
    # All queries, then all keys, then all values.
    weight = Part(
      f'{theirs}.wqkv.weight', (rows, dim), (3, heads, width, dim), (place,)
    )
    found[f'{ours}/{name}'] = Leaf(
      (weight,),
      lambda parts: parts[0].transpose(2, 0, 1),
      lambda leaf: [leaf.transpose(1, 2, 0)],
    )
    if config.bias == 'all':
      found[f'{ours}/{name}_bias'] = as_is(
        Part(f'{theirs}.wqkv.bias', (rows,), (3, heads, width), (place,))
      )
  wo = Part(f'{theirs}.wo.weight', (dim, heads * width))
  found[f'{ours}/output'] = transposed(wo, (heads, width, dim))
  if config.bias == 'all':
    found[f'{ours}/output_bias'] = as_is(Part(f'{theirs}.wo.bias', (dim,)))
  if config.qk_norm == 'head':
    for name in ('query', 'key'):
      tensor = f'{theirs}.{name[0]}_norm.scale'
      found[f'{ours}/{name}_norm/scale'] = as_is(Part(tensor, (width,)))
  names = dict(hidden='dw1', low_rank='qkw', gate='dd')
  shapes = _generator(config)
  for leaf, tensor in names.items():
    part = Part(f'{theirs}.dyn_w_proj.{tensor}', shapes[tensor])
    found[f'{ours}/dcmha/{leaf}'] = as_is(part)
  for place in ('pre', 'post') if config.dcmha.base else ():
    part = Part(f'{theirs}.dyn_w_proj.{place}_proj.w', (1, heads, heads))
    found[f'{ours}/dcmha/{place}_base'] = as_is(part)
  return found


def _mlp(config: ModelConfig, ours: str, theirs: str, kind: str) -> Layout:
  dim, width = config.model_dim, config.mlp_dim
  names = dict(gate='w1', up='w3', down='w2')
  if kind == 'dcpythia':
    names = dict(up='w1', down='w2')
  found = {}
  for name, tensor in names.items():
    shape = (dim, width) if name == 'down' else (width, dim)
    weight = Part(f'{theirs}.{tensor}.weight', shape)
    found[f'{ours}/{name}'] = transposed(weight)
    if config.bias == 'all':
      bias = Part(f'{theirs}.{tensor}.bias', shape[:1])
      found[f'{ours}/{name}_bias'] = as_is(bias)
  return found
