# SPDX-License-Identifier: Apache-2.0
"""Adapters in files: RUN/adapters/NAME, which any copy of its base takes.

Tensors are in `adapter.safetensors` (of LoRA) or `rows.safetensors` (of rows),
by the paths of leaves such as 'block_00/attention/query/a'. What else there is
to know is in `adapter.json`: its `format`, the `kind`, the `base`, which is a
fingerprint of the base's parameters, and the settings of the kind.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
from etils import epath
from safetensors import numpy as safetensors_numpy

from jaxsparse.config.errors import require, shown
from jaxsparse.run import workdir as workdir_lib

FORMAT = 1
JSON = 'adapter.json'
# The file of tensors, by the kind.
FILES = dict(lora='adapter.safetensors', rows='rows.safetensors')
# In a run's workdir.
FOLDER = 'adapters'

# What a file that is cut off or damaged ends in.
_TROUBLES = (
  OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError,
)  # fmt: skip

# Of numbers, as safetensors calls them.
_TYPES = dict(
  F32='float32', F16='float16', BF16='bfloat16', I32='int32', I8='int8'
)

Tensors = dict[str, np.ndarray]
Meta = dict[str, Any]


def folder_of(workdir: epath.PathLike, name: str) -> epath.Path:
  """Where a run's adapter of that name lies."""
  return epath.Path(workdir) / FOLDER / name


def names(workdir: epath.PathLike) -> list[str]:
  """Of the adapters that a run has written."""
  folder = epath.Path(workdir) / FOLDER
  found = folder.iterdir() if folder.exists() else ()
  return sorted(path.name for path in found if (path / JSON).exists())


def write(folder: epath.PathLike, tensors: Tensors, meta: Meta) -> None:
  """Writes an adapter, over an earlier one; each file at once or not at all.

  Args:
    folder: made if it is missing.
    tensors: by path.
    meta: what JSON can hold: 'kind', 'base' and the settings of the kind.

  Raises:
    UserError: it can't be written.
  """
  path = epath.Path(folder)
  content = safetensors_numpy.save(
    {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  )
  meta = {'format': FORMAT, **meta, 'sha256': _hash(content)}
  with workdir_lib.write_errors(folder):
    path.mkdir(parents=True, exist_ok=True)
    workdir_lib.write_whole(path / FILES[meta['kind']], content)
    text = json.dumps(meta, indent=2) + '\n'
    workdir_lib.write_whole(path / JSON, text.encode())


def read(folder: epath.PathLike) -> tuple[Tensors, Meta]:
  """The tensors of an adapter, and what `write` got as `meta`.

  Raises:
    UserError: there is none, it is of a later version, cut off or damaged, or
      holds what is not a finite number.
  """
  path, meta = epath.Path(folder), read_meta(folder)
  file = path / FILES[meta['kind']]
  trouble = 'is not what was written with it'
  tensors: Tensors = {}
  try:
    content = file.read_bytes()
    tensors = _loaded(content)
    is_whole = _hash(content) == meta.get('sha256', _hash(content))
  except _TROUBLES as error:
    is_whole, trouble = False, f"can't be read ({shown(str(error))[1:-1]})"
  require(
    is_whole,
    f'{str(file)!r} {trouble}: it is cut off or damaged, so copy it again, or '
    'let its run save again.',
  )
  for name, x in tensors.items():
    is_number = x.dtype.kind in 'iu' or bool(np.isfinite(x).all())
    require(
      is_number,
      f'{name} in {str(file)!r} holds what is not a finite number: the adapter '
      'is of no use.',
    )
  return tensors, meta


def read_meta(folder: epath.PathLike) -> Meta:
  """What there is to know of an adapter beside its tensors.

  Raises:
    UserError: there is none, or it is of a later version or damaged.
  """
  path = epath.Path(folder) / JSON
  require(
    path.exists(),
    f'there is no adapter in {str(folder)!r}, which holds no {JSON}: give a '
    f'folder such as RUN/{FOLDER}/NAME.',
  )
  try:
    meta = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError):
    meta = None
  require(
    isinstance(meta, dict)
    and meta.get('kind') in FILES
    and isinstance(meta.get('base'), str)
    and isinstance(meta.get('format'), int),
    f'{str(path)!r} is damaged: copy it again, or let its run save again.',
  )
  require(
    meta['format'] <= FORMAT,
    f'{str(path)!r} has the format {meta["format"]}, and this version of '
    f'jaxsparse reads {FORMAT}: install a later one.',
  )
  return meta


def require_base(
  folder: epath.PathLike, meta: Meta, base: str, is_forced: bool = False
) -> None:
  """Refuses an adapter of another base.

  Args:
    folder: of the adapter.
    meta: what it says.
    base: of the parameters that it is to stand beside, see
      `stored.params_fingerprint`.
    is_forced: take it all the same.

  Raises:
    UserError: it is of another.
  """
  require(
    is_forced or meta['base'] == base,
    f'the adapter in {str(folder)!r} was trained beside other parameters (of '
    f'the fingerprint {meta["base"][:12]}, and these have {base[:12]}): give '
    'the workdir that it was trained from, or --force.',
  )


def require_distinct(folders: Iterable[epath.PathLike]) -> None:
  """Refuses an adapter that is there twice: it would be added twice.

  Args:
    folders: of adapters that go together.

  Raises:
    UserError: two are of the same numbers, one folder or a copy of it.
  """
  seen: dict[str, str] = {}
  for folder in map(str, folders):
    digest = digest_of(folder, read_meta(folder))
    other = seen.get(digest, '')
    same = 'is named twice' if other == folder else f'is that in {other!r}'
    require(
      not other,
      f'the adapter in {folder!r} {same}, and its differences would be added '
      'twice: name it once.',
    )
    seen[digest] = folder


def digest_of(folder: epath.PathLike, meta: Meta) -> str:
  """The same for the same numbers, wherever they lie.

  Args:
    folder: of the adapter.
    meta: what it says.
  """
  return meta.get('sha256') or str(epath.Path(folder))


def _loaded(content: bytes) -> Tensors:
  """What safetensors' own reader makes of it, and bfloat16 besides."""
  return {
    name: np.frombuffer(of['data'], jnp.dtype(_TYPES[of['dtype']])).reshape(
      of['shape']
    )
    for name, of in safetensors.deserialize(content)
  }


def _hash(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()
