# SPDX-License-Identifier: Apache-2.0
"""DCFormer as its MaxText fork trains it: an Orbax checkpoint of a scan.

Blocks of one place in the pattern of windows are one array, with their number
as axis 1. The run's config.yml, which the checkpoint lacks, must be beside it.
"""

import pathlib
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from jaxsparse.config import DCMHAConfig, ModelConfig
from jaxsparse.config.errors import UserError, require
from jaxsparse.config.model import block_name
from jaxsparse.interop import yaml_file
from jaxsparse.interop.config_json import Fields
from jaxsparse.interop.importing import Opened
from jaxsparse.interop.layout import Layout, Part, as_is, transposed

CONFIG = 'config.yml'

_TABLE = 'token_embedder.embedding'
_HEAD = 'decoder.logits_dense.kernel'
_BLOCKS = r'decoder\.layers\.(\w+?)_(\d+)\.(.+)'

# Fields of config.yml from which a model of the fork follows; those of the run,
# of its data and of its hardware are many, and change none.
_BASE = 10_000.0


def find(path: pathlib.Path) -> pathlib.Path | None:
  """The folder of a checkpoint's state: in a run, a step of it, or itself."""
  numbers = [p for p in path.iterdir() if p.is_dir() and p.name.isdigit()]
  newest = max(numbers, key=lambda p: int(p.name), default=path)
  for folder in (path, path / 'state', newest / 'state'):
    if (folder / '_METADATA').is_file():
      return folder
  return None


def open_folder(path: pathlib.Path, state: pathlib.Path) -> Opened:
  """Reads what a checkpoint and the config.yml beside it say.

  Args:
    path: that was named.
    state: what `find` found in it.

  Raises:
    UserError: it is damaged, or of a model that we do not have.
  """
  places = (path, *state.parents[:3])
  file = next((p / CONFIG for p in places if (p / CONFIG).is_file()), None)
  require(
    file is not None,
    f'{str(path)!r} is an Orbax checkpoint without a {CONFIG}: put the one of '
    'the MaxText run that wrote it there.',
  )
  leaves = _Leaves(state)
  content = yaml_file.read(file)
  config, length = _config(content, leaves)
  return Opened(
    source=_Blocks(leaves, config),
    layout=_layout(config),
    config=config,
    length=length,
    family='dcformer',
    origin=dict(format='MaxText', family='dcformer', folder=path.name),
    write_tokenizer=lambda workdir: (
      'A MaxText run has no tokenizer beside it: the model reads ids of tokens '
      'only.'
    ),
  )


class _Leaves:
  """The arrays of a checkpoint, of which parts are read."""

  def __init__(self, state: pathlib.Path):
    try:
      tree = ocp.PyTreeCheckpointer().metadata(state).item_metadata
      found = _flat(tree.tree)
      self.shapes = {k: tuple(v.shape) for k, v in found.items()}
      self.types = {k: np.dtype(v.dtype).name for k, v in found.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
      raise UserError(
        f'{str(state)!r} is no Orbax checkpoint, or is damaged '
        f'({type(error).__name__}): fetch it again.'
      ) from error
    self._state = state
    self._driver = 'zarr3' if tree.use_zarr3 else 'zarr'
    self._is_one_file = (state / 'manifest.ocdbt').is_file()
    self._paths = {k: v.name for k, v in found.items()}

  def read(self, name: str, index: tuple[Any, ...]) -> np.ndarray:
    path = self._paths[name]
    store: dict[str, Any] = dict(driver='file', path=f'{self._state}/{path}/')
    if self._is_one_file:
      base = dict(driver='file', path=f'{self._state}/')
      store = dict(driver='ocdbt', base=base, path=f'{path}/')
    try:
      spec = dict(driver=self._driver, kvstore=store)
      array = tensorstore.open(spec, read=True).result()
      return np.asarray(array[index].read().result())
    except (OSError, ValueError) as error:
      raise UserError(
        f"{name} can't be read from {str(self._state)!r}: the checkpoint is "
        'damaged, so fetch it again.'
      ) from error


def _flat(tree: Any, name: str = '') -> dict[str, Any]:
  """Parameters by their names, without optimizer and step."""
  found = {}
  for key, value in tree.items():
    if not name and key != 'params':
      continue
    if isinstance(value, dict):
      found |= _flat(value, f'{name}{key}.')
    else:
      found[re.sub(r'^(params\.)+', '', f'{name}{key}')] = value
  return found


class _Blocks:
  """The arrays as if they were of one block each, with the rows in use."""

  def __init__(self, leaves: _Leaves, config: ModelConfig):
    self._leaves = leaves
    self._places: dict[str, tuple[str, tuple[Any, ...]]] = {}
    rows = slice(config.vocab_size)
    for name, shape in leaves.shapes.items():
      match = re.fullmatch(_BLOCKS, name)
      if not match:
        crops = {_TABLE: (rows,), _HEAD: (slice(None), rows)}
        self._places[name] = name, crops.get(name, ())
        continue
      of, place, rest = match.groups()
      pattern = len(config.attention_pattern)
      for i in range(shape[1] if len(shape) > 1 else 0):
        block = i * pattern + int(place)
        self._places[f'{block}.{of}.{rest}'] = name, (slice(None), i)

  def names(self) -> Iterable[str]:
    return self._places.keys()

  def shape(self, name: str) -> tuple[int, ...]:
    of, index = self._places[name]
    # No memory is behind it.
    whole = np.broadcast_to(np.int8(0), self._leaves.shapes[of])
    return whole[index].shape

  def dtype(self, name: str) -> str:
    return self._leaves.types[self._places[name][0]]

  def read(self, name: str) -> np.ndarray:
    return self._leaves.read(*self._places[name])


def _config(
  content: dict[str, Any], leaves: _Leaves
) -> tuple[ModelConfig, int]:
  fields = Fields(content, CONFIG)
  fields.expect('decoder_block', 'dcformer')
  fields.expect('scan_layers', True)
  fields.expect('param_scan_axis', 1)
  fields.expect('fused_qkv', False)
  fields.expect('fused_mlp', False)
  fields.expect('pre_compose', True)
  fields.expect('post_compose', True)
  fields.expect('query_wise', True)
  fields.expect('key_wise', True)
  fields.expect('mgate', False)
  fields.expect('num_experts', 1)
  fields.expect('logits_via_embedding', False)
  fields.expect('mlp_activations', ['silu', 'linear'])
  query = leaves.shapes.get('decoder.layers.self_attention_0.query.kernel', ())
  mlp = leaves.shapes.get('decoder.layers.mlp_0.wi_0.kernel', ())
  require(
    len(query) == 4 and len(mlp) == 3,
    'the checkpoint lacks decoder.layers.self_attention_0.query.kernel [D, '
    'blocks, N, H] or decoder.layers.mlp_0.wi_0.kernel [D, blocks, F]: it is '
    'of another model than the DCFormer of MaxText.',
  )
  dim, blocks, heads, width = query
  windows = content.get('window_size') or [None]
  sizes = {size for size in windows if size is not None}
  require(
    len(sizes) <= 1 and all(type(size) is int and size > 0 for size in sizes),
    f'window_size = {windows} in {CONFIG} must have windows of one size: '
    'jaxsparse has one for all blocks.',
  )
  epsilon = fields.take('normalization_layer_epsilon', float, 1e-5)
  found: dict[str, Any] = {}
  if sizes:
    kinds = ('global' if size is None else 'local' for size in windows)
    found = dict(attention_pattern=tuple(kinds), window=sizes.pop())
  if fields.take('qk_norm', bool, False):
    found |= dict(qk_norm='head', qk_norm_epsilon=epsilon)
  has_base = fields.take('static_proj', bool, False)
  config = ModelConfig(
    num_layers=blocks * len(windows),
    model_dim=dim,
    num_heads=heads,
    num_kv_heads=heads,
    head_dim=width,
    mlp_dim=mlp[2],
    vocab_size=fields.take('vocab_size', int),
    tie_embeddings=False,
    norm_epsilon=epsilon,
    rope_max_wavelength=_BASE,
    # GELU of the generator by its tanh form, as all of JAX.
    dcmha=DCMHAConfig(gelu='tanh', base=has_base),
    **found,
  )
  return config, fields.take('max_target_length', int, 2049) - 1


def _layout(config: ModelConfig) -> Layout:
  dim, heads, width = config.model_dim, config.num_heads, config.head_dim
  rows, twice = config.vocab_size, 2 * config.dcmha.rank
  found = {
    'embed/table': as_is(Part(_TABLE, (rows, dim))),
    'output': transposed(Part(_HEAD, (dim, rows))),
    'final_norm/scale': as_is(Part('decoder.decoder_norm.scale', (dim,))),
  }
  maps = 'AttentionOp_0.dyn_w_proj'
  shapes = {
    'attention_norm/scale': ('pre_self_attention_layer_norm.scale', (dim,)),
    'mlp_norm/scale': ('post_self_attention_layer_norm.scale', (dim,)),
    'mlp/gate': ('mlp.wi_0.kernel', (dim, config.mlp_dim)),
    'mlp/up': ('mlp.wi_1.kernel', (dim, config.mlp_dim)),
    'mlp/down': ('mlp.wo.kernel', (config.mlp_dim, dim)),
    'attention/output': ('self_attention.out.kernel', (heads, width, dim)),
    'attention/dcmha/hidden': (
      f'self_attention.{maps}.dw1.kernel',
      (dim, 1, 4, twice * heads),
    ),
    'attention/dcmha/low_rank': (
      f'self_attention.{maps}.qkw',
      (1, 4, twice * heads, twice, heads),
    ),
    'attention/dcmha/gate': (
      f'self_attention.{maps}.dd.kernel',
      (dim, 1, 4 * heads),
    ),
  }
  for name in ('query', 'key', 'value'):
    shape = (dim, heads, width)
    shapes[f'attention/{name}'] = f'self_attention.{name}.kernel', shape
  for name in ('query', 'key') if config.qk_norm == 'head' else ():
    tensor = f'self_attention.{name[0]}_norm.scale'
    shapes[f'attention/{name}_norm/scale'] = tensor, (width,)
  for place in ('pre', 'post') if config.dcmha.base else ():
    tensor = f'self_attention.AttentionOp_0.{place}_proj.w'
    shapes[f'attention/dcmha/{place}_base'] = tensor, (1, heads, heads)
  for i in range(config.num_layers):
    for name, (tensor, shape) in shapes.items():
      found[f'{block_name(i)}/{name}'] = as_is(Part(f'{i}.{tensor}', shape))
  return found
