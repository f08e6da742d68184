# SPDX-License-Identifier: Apache-2.0
"""Adapters of LoRA in the files of peft, for models that transformers loads.

  {module}.lora_A.weight [r, in]       ours transposed, a [in, r]
  {module}.lora_B.weight [out, r]      b [r, out]
  {module}.lora_magnitude_vector [out] magnitude, of DoRA

Names of modules begin with 'base_model.model.'. Settings are in
adapter_config.json.
"""

import json
import math
import pathlib
import re
from typing import Any

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from jaxsparse.config import AdapterConfig
from jaxsparse.config.errors import UserError, require, shown
from jaxsparse.interop.layout import Layout, Leaf, is_finite
from jaxsparse.nn import adapters
from jaxsparse.ops.adapted_matrix import AdaptedMatrix
from jaxsparse.run import workdir as workdir_lib

CONFIG, TENSORS = 'adapter_config.json', 'adapter_model.safetensors'

_PREFIX = 'base_model.model.'
_SUFFIXES = dict(
  a='.lora_A.weight', b='.lora_B.weight', magnitude='.lora_magnitude_vector'
)
# Settings that change what is computed, and their values here.
_NONE = dict(
  bias=('none',),
  fan_in_fan_out=(False,),
  rank_pattern=({},),
  alpha_pattern=({},),
  modules_to_save=([],),
  layer_replication=([],),
  lora_bias=(False,),
  trainable_token_indices=([],),
  target_parameters=([],),
  alora_invocation_tokens=([],),
  arrow_config=({},),
  use_qalora=(False,),
  use_bdlora=(False,),
)
# Of `init_lora_weights`, those that leave the base as it is.
_INITS = (True, False, None, 'gaussian', 'eva', 'orthogonal')

Tensors = dict[str, np.ndarray]


def modules(layout: Layout) -> dict[str, str]:
  """The module of transformers that each adaptable leaf is the weight of.

  Args:
    layout: of a model that transformers loads.

  Returns:
    Names such as 'model.layers.0.self_attn.q_proj', by the paths of leaves.
    Leaves that share a tensor with others, or lie otherwise than transposed,
    are not among them.
  """
  found = {}
  for path, leaf in layout.items():
    name = leaf.sources[0].name
    if _is_weight(path, leaf) and name.endswith('.weight'):
      found[path] = name.removesuffix('.weight')
  return found


def _is_weight(path: str, leaf: Leaf) -> bool:
  """Whether the leaf is one tensor [out, in], with nothing moved in it."""
  place = tuple(path.split('/'))
  if len(leaf.sources) > 1 or not adapters.contracted(place):
    return False
  part = leaf.sources[0]
  if part.view or part.index or len(part.whole) != 2:
    return False
  theirs = np.arange(math.prod(part.whole)).reshape(part.whole)
  ours = leaf.to_ours([theirs])
  return bool((theirs == _as_matrix(place, ours).T).all())


def _as_matrix(place: adapters.Path, leaf: np.ndarray) -> np.ndarray:
  """[in, out] of a leaf."""
  read = adapters.contracted(place)
  leaf = np.moveaxis(leaf, read, range(len(read)))
  return leaf.reshape(math.prod(leaf.shape[: len(read)]), -1)


def write(
  folder: pathlib.Path, config: AdapterConfig, tensors: Tensors, layout: Layout
) -> None:
  """Writes an adapter for peft.

  Args:
    folder: new or empty.
    config: of the adapter.
    tensors: by our paths, such as 'block_00/attention/query/a'.
    layout: of the model, as transformers has it.

  Raises:
    UserError: a matrix is no module's whole weight there, or the folder can't
      be written.
  """
  names, found = modules(layout), {}
  for path, tensor in tensors.items():
    leaf, _, part = path.rpartition('/')
    require(
      leaf in names,
      f'{leaf} is not the whole weight of a module of transformers, which an '
      "adapter of peft is for: export the merged model by 'convert to-hf'.",
    )
    theirs = tensor.reshape(tensor.shape[0], -1)
    if part == 'a':
      theirs = tensor.reshape(-1, tensor.shape[-1])
    theirs = tensor.reshape(-1) if part == 'magnitude' else theirs.T
    found[_PREFIX + names[leaf] + _SUFFIXES[part]] = np.ascontiguousarray(
      theirs
    )
  adapted = {names[path.rpartition('/')[0]] for path in tensors}
  content = dict(
    peft_type='LORA',
    task_type='CAUSAL_LM',
    base_model_name_or_path='',
    r=config.rank,
    lora_alpha=config.alpha,
    lora_dropout=config.dropout,
    use_rslora=config.use_rslora,
    use_dora=config.use_dora,
    target_modules=_targets(adapted, set(names.values())),
    bias='none',
    fan_in_fan_out=False,
    inference_mode=True,
    init_lora_weights=True,
    rank_pattern={},
    alpha_pattern={},
    modules_to_save=None,
  )
  with workdir_lib.write_errors(folder):
    folder.mkdir(parents=True, exist_ok=True)
    tensor_bytes = safetensors_numpy.save(found, dict(format='pt'))
    workdir_lib.write_whole(folder / TENSORS, tensor_bytes)
    text = json.dumps(content, indent=2) + '\n'
    workdir_lib.write_whole(folder / CONFIG, text.encode())


def _targets(adapted: set[str], known: set[str]) -> list[str]:
  """Last names of modules where these say all, else whole names."""
  last = {name.rpartition('.')[2] for name in adapted}
  named = {name for name in known if name.rpartition('.')[2] in last}
  return sorted(last if named == adapted else adapted)


def read(folder: pathlib.Path, layout: Layout) -> tuple[AdapterConfig, Tensors]:
  """An adapter of peft, as ours.

  Args:
    folder: as peft writes it.
    layout: of the model that it is for.

  Returns:
    Its settings, and tensors in float32 by our paths.

  Raises:
    UserError: there is none, it is damaged, of another kind than LoRA, has
      settings that we have not, or is for another model.
  """
  content = _read_config(folder)
  paths = {module: path for path, module in modules(layout).items()}
  found: Tensors = {}
  for name, tensor in _read_tensors(folder).items():
    module, part = _parsed(name)
    require(
      module in paths and bool(part),
      f'{TENSORS} holds {name}, for which this model has no matrix: give the '
      'workdir of the model that the adapter is for.',
    )
    leaf = layout[paths[module]]
    shape = leaf.to_ours([np.broadcast_to(np.int8(0), leaf.sources[0].whole)])
    found[f'{paths[module]}/{part}'] = _ours(
      name, paths[module], part, tensor, shape.shape, content['r']
    )
  leaves = sorted({path.rpartition('/')[0] for path in found})
  require(bool(leaves), f'{TENSORS} in {str(folder)!r} holds nothing.')
  config = AdapterConfig(
    kind='lora',
    rank=content['r'],
    alpha=float(content['lora_alpha']),
    dropout=float(content.get('lora_dropout') or 0),
    use_rslora=bool(content.get('use_rslora')),
    use_dora=bool(content.get('use_dora')),
    targets=f'^({"|".join(map(re.escape, leaves))})$',
  )
  return config, found


def num_matrices(tensors: Tensors) -> int:
  return len({path.rpartition('/')[0] for path in tensors})


def _ours(name, path, part, tensor, shape, rank):
  """A tensor as we have it."""
  place = tuple(path.split('/'))
  matrix = AdaptedMatrix(
    np.broadcast_to(np.int8(0), shape),
    None,
    None,
    contracted=adapters.contracted(place),
  )
  ours = matrix.of_dims(shape, rank, 1)[part]
  read = math.prod(shape[i] for i in matrix.contracted)
  written = math.prod(shape) // read
  theirs = dict(a=(rank, read), b=(written, rank), magnitude=(written,))[part]
  require(
    tensor.shape == theirs,
    f'{name} must have the shape {list(theirs)}, of r = {rank}, but has '
    f'{list(tensor.shape)}.',
  )
  require(
    is_finite(tensor),
    f'{name} holds what is not a finite number: fetch the adapter again.',
  )
  return np.ascontiguousarray(tensor.T).astype(np.float32).reshape(ours)


def _parsed(name: str) -> tuple[str, str]:
  module = name.removeprefix(_PREFIX)
  for part, suffix in _SUFFIXES.items():
    # Of the latter there are two forms.
    for end in (suffix, f'{suffix}.weight'):
      if module.endswith(end):
        return module.removesuffix(end), part
  return module, ''


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
  path = folder / CONFIG
  require(
    path.is_file(),
    f'{str(folder)!r} holds no {CONFIG}: give a folder that peft wrote.',
  )
  try:
    content = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError):
    content = None
  numbers = (int, float)
  require(
    isinstance(content, dict)
    and type(content.get('r')) is int
    and isinstance(content.get('lora_alpha', 8), numbers),
    f'{str(path)!r} must be a JSON object with the settings r and lora_alpha '
    'of an adapter, but is not: fetch it again.',
  )
  content.setdefault('lora_alpha', 8)
  require(
    content.get('peft_type') == 'LORA',
    f'peft_type must be LORA in {CONFIG}, got '
    f'{shown(content.get("peft_type"))}.',
  )
  for name, allowed in _NONE.items():
    value = content.get(name)
    require(
      not value or value in allowed,
      f'{name} = {shown(value)} in {CONFIG} is not supported: only adapters '
      'with one rank, without biases and other trained modules are.',
    )
  init = content.get('init_lora_weights')
  require(
    init in _INITS,
    f'init_lora_weights = {shown(init)} in {CONFIG} began from other weights '
    'than those of the base: merge the adapter by peft, and import the model.',
  )
  return content


def _read_tensors(folder: pathlib.Path) -> Tensors:
  path = folder / TENSORS
  require(
    path.is_file(),
    f'{str(folder)!r} holds no {TENSORS}: pickles (adapter_model.bin) are not '
    'read, so save the adapter anew by a later peft.',
  )
  try:
    with safetensors.safe_open(path, 'numpy') as file:
      return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except (safetensors.SafetensorError, OSError, ValueError, TypeError) as error:
    raise UserError(
      f"{str(path)!r} can't be read as safetensors "
      f'({shown(str(error))[1:-1]}): it is cut off or damaged, so fetch it '
      'again.'
    ) from error
