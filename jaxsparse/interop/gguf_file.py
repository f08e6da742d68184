# SPDX-License-Identifier: Apache-2.0
"""A GGUF file of llama.cpp, quantized or not, read as a Llama's folder is."""

import dataclasses
import pathlib
import tempfile
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxsparse import config as config_lib
from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import UserError, require, shown
from jaxsparse.interop import gguf_tokenizer, tokenizers_in
from jaxsparse.interop.config_json import Fields
from jaxsparse.interop.families import llama
from jaxsparse.interop.importing import Opened
from jaxsparse.nn.attention import rotation

# Whose numbers are float32 when they are read.
_TYPES = ('F32', 'F16', 'BF16', 'Q8_0', 'Q4_0', 'Q4_1', 'Q4_K', 'Q6_K')

# Names of a block's tensors beside those of a Llama in transformers.
_NAMES = dict(
  attn_norm='input_layernorm',
  attn_q='self_attn.q_proj',
  attn_k='self_attn.k_proj',
  attn_v='self_attn.v_proj',
  attn_output='self_attn.o_proj',
  ffn_norm='post_attention_layernorm',
  ffn_gate='mlp.gate_proj',
  ffn_up='mlp.up_proj',
  ffn_down='mlp.down_proj',
)
_OUTSIDE = {
  'token_embd.weight': llama.EMBEDDING,
  'output_norm.weight': 'model.norm.weight',
  'output.weight': llama.HEAD,
}
# What lower frequencies are divided by, for which there is no metadata.
_FREQUENCIES = 'rope_freqs.weight'
# The factors of Llama 3.1 and 3.2.
_KNOWN_FACTORS = (8.0, 32.0)

_LENGTH = 2048


def open_file(path: pathlib.Path) -> Opened:
  """Reads what a file says of its model and of its tensors.

  Raises:
    UserError: it is damaged, or of a model that we do not have.
  """
  metadata, tensors = read_table(path)
  architecture = metadata.get('general.architecture')
  require(
    architecture == 'llama',
    f'general.architecture = {shown(architecture)} in {path.name} is a model '
    'that jaxsparse does not read from GGUF: it reads llama; give its folder '
    'of safetensors.',
  )
  parts = metadata.get('split.count') or 1
  require(
    parts == 1,
    f'{path.name} is one of {parts} parts of a file: join them first, by '
    'llama-gguf-split --merge.',
  )
  fields = Fields(_of_model(metadata), path.name)
  config = _config(fields, metadata, 'output.weight' in tensors)
  source = GGUFSource(path, tensors, config)
  if _FREQUENCIES in tensors:
    config = _with_scaling(config, source.read(_FREQUENCIES), path.name)
    tensors = {name: of for name, of in tensors.items() if name != _FREQUENCIES}
    source = GGUFSource(path, tensors, config)

  def write_tokenizer(workdir: epath.PathLike) -> str:
    with tempfile.TemporaryDirectory() as folder:
      gguf_tokenizer.write(metadata, pathlib.Path(folder), path.name)
      return tokenizers_in.copy_tokenizer(folder, workdir, config.vocab_size)

  return Opened(
    source=source,
    layout=llama.layout(config, 'llama'),
    config=config,
    length=fields.take('llama.context_length', int, _LENGTH),
    family='llama',
    origin=dict(format='GGUF', family='llama', file=path.name),
    write_tokenizer=write_tokenizer,
  )


@dataclasses.dataclass(frozen=True)
class Entry:
  """A tensor in a file; `shape` has the fastest axis last."""

  shape: tuple[int, ...]
  kind: Any
  offset: int
  num_bytes: int


class GGUFSource:
  """The tensors of a file, float32, under the names of transformers."""

  def __init__(
    self, path: pathlib.Path, tensors: dict[str, Entry], config: ModelConfig
  ):
    """Takes what the file's table says.

    Args:
      path: of the file.
      tensors: entries of the table, by their names.
      config: whose heads queries and keys have.
    """
    self._path, self._config = path, config
    self._tensors = {_renamed(name): of for name, of in tensors.items()}

  def names(self) -> Iterable[str]:
    return self._tensors.keys()

  def shape(self, name: str) -> tuple[int, ...]:
    return self._tensors[name].shape

  def dtype(self, name: str) -> str:
    kind = self._tensors[name].kind.name
    return 'float32' if kind in _TYPES else kind

  def read(self, name: str) -> np.ndarray:
    """The whole tensor, with rows of queries and keys in our order."""
    entry = self._tensors[name]
    # Not by the reader's map, whose pages would stay in memory.
    content = np.fromfile(
      self._path, np.uint8, entry.num_bytes, offset=entry.offset
    )
    rows = content.reshape(*entry.shape[:-1], -1)
    found = _gguf().dequantize(rows, entry.kind).reshape(entry.shape)
    heads = dict(
      q_proj=self._config.num_heads, k_proj=self._config.num_kv_heads
    )
    return _half_split(found, heads.get(name.split('.')[-2], 0))


def _half_split(weight: np.ndarray, num_heads: int) -> np.ndarray:
  """Rows of heads whose pairs of coordinates stood side by side, if any."""
  if not num_heads:
    return weight
  pairs = weight.reshape(num_heads, -1, 2, weight.shape[-1])
  return pairs.swapaxes(1, 2).reshape(weight.shape)


def _renamed(name: str) -> str:
  if name in _OUTSIDE:
    return _OUTSIDE[name]
  match name.split('.'):
    case 'blk', block, kind, 'weight' if kind in _NAMES:
      return f'model.layers.{block}.{_NAMES[kind]}.weight'
  return name


def _config(
  fields: Fields, metadata: dict[str, Any], has_head: bool
) -> ModelConfig:
  """The model of the metadata; all that is of the architecture is looked at."""
  take = fields.take
  dim = take('llama.embedding_length', int)
  heads = take('llama.attention.head_count', int)
  head_dim = take('llama.attention.key_length', int, dim // heads)
  fields.expect('llama.attention.value_length', head_dim)
  fields.expect('llama.expert_count', 0)
  fields.expect('llama.expert_used_count', 0)
  fields.skip(
    'llama.context_length',
    'llama.vocab_size',
    'llama.rope.scaling.original_context_length',
    'llama.rope.scaling.finetuned',
  )
  found: dict[str, Any] = {}
  scaling = take('llama.rope.scaling.type', str, 'none')
  factor = take('llama.rope.scaling.factor', float, 1.0)
  if scaling == 'linear' and factor != 1:
    found['rope_scaling'] = config_lib.RopeScalingConfig(
      kind='linear', factor=factor
    )
  fields.expect('llama.rope.scaling.type', 'none', 'linear')
  rotated = take('llama.rope.dimension_count', int, head_dim)
  tokens = Fields(metadata, 'the file').take(gguf_tokenizer.TOKENS, list, [])
  try:
    config = ModelConfig(
      num_layers=take('llama.block_count', int),
      model_dim=dim,
      num_heads=heads,
      num_kv_heads=take('llama.attention.head_count_kv', int, heads),
      head_dim=head_dim,
      mlp_dim=take('llama.feed_forward_length', int),
      vocab_size=len(tokens) or take('llama.vocab_size', int),
      tie_embeddings=not has_head,
      norm_epsilon=_rounded(
        take('llama.attention.layer_norm_rms_epsilon', float)
      ),
      rope_max_wavelength=take('llama.rope.freq_base', float, 10_000.0),
      rope_fraction=rotated / head_dim,
      **found,
    )
  except UserError as error:
    if 'llama.' in str(error):
      raise
    raise UserError(
      f'the metadata describe a model that can not be: {error}'
    ) from error
  fields.finish()
  return config


def _rounded(value: float) -> float:
  """A float32 that is the nearest one to a short decimal, as that decimal."""
  return float(str(np.float32(value)))


def _with_scaling(
  config: ModelConfig, divisors: np.ndarray, name: str
) -> ModelConfig:
  """The model with the scaling that a tensor of divisors was made by."""
  exponents = np.arange(0, config.rope_dim, 2) / config.rope_dim
  plain = jnp.asarray(config.rope_max_wavelength**-exponents)
  for factor in _KNOWN_FACTORS:
    scaling = config_lib.RopeScalingConfig(kind='llama3', factor=factor)
    scaled = dataclasses.replace(config, rope_scaling=scaling)
    expected = plain / rotation.settings(scaled)['scaling'](plain)
    is_like = divisors.shape == expected.shape
    if is_like and np.allclose(expected, divisors, rtol=1e-4):
      return scaled
  raise UserError(
    f'{_FREQUENCIES} in {name} scales rotary embeddings in a way that is not '
    "Llama 3.1's or 3.2's: give the folder of safetensors, whose config says "
    'how.'
  )


def _of_model(metadata: dict[str, Any]) -> dict[str, Any]:
  return {k: v for k, v in metadata.items() if k.startswith('llama.')}


def read_table(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Entry]]:
  """The metadata, and the table of the tensors, without their content.

  Raises:
    UserError: it is no GGUF file, or is damaged.
  """
  gguf = _gguf()
  try:
    reader = gguf.GGUFReader(path)
    metadata = {name: of.contents() for name, of in reader.fields.items()}
    # What maps the file goes with the reader.
    tensors = {
      x.name: Entry(
        tuple(reversed(x.shape.tolist())),
        x.tensor_type,
        x.data_offset,
        x.n_bytes,
      )
      for x in reader.tensors
    }
  except (ValueError, IndexError, KeyError, OSError, OverflowError) as error:
    raise UserError(
      f'{str(path)!r} is no GGUF file, or is damaged or cut off '
      f'({type(error).__name__}): fetch it again.'
    ) from error
  end = max((x.offset + x.num_bytes for x in tensors.values()), default=0)
  require(
    end <= path.stat().st_size,
    f'{str(path)!r} is cut off: fetch it again.',
  )
  return metadata, tensors


def _gguf() -> Any:
  try:
    import gguf
  except ImportError as error:
    raise UserError(
      'a GGUF file needs the package gguf, which is not installed: '
      "pip install 'jaxsparse[gguf]'."
    ) from error
  return gguf
