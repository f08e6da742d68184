# SPDX-License-Identifier: Apache-2.0
"""Where tensors of a checkpoint are read from, one at a time."""

import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Protocol

import numpy as np
import safetensors

from jaxsparse.config.errors import UserError, require, shown

INDEX = 'model.safetensors.index.json'
WHOLE = 'model.safetensors'
# What pickles are called.
_PICKLES = ('*.bin', '*.pt', '*.pth', '*.ckpt', '*.pkl')

# As safetensors names them: those that float32 holds, or nearly.
_TYPES = dict(F64='float64', F32='float32', F16='float16', BF16='bfloat16')


class Source(Protocol):
  """Named tensors, each read when it is asked for."""

  def names(self) -> Iterable[str]:
    """All of them."""

  def shape(self, name: str) -> tuple[int, ...]:
    """Of one, without reading it."""

  def dtype(self, name: str) -> str:
    """As NumPy names it, or as the file does where NumPy has no name."""

  def read(self, name: str) -> np.ndarray:
    """The whole tensor, in memory of its own."""


class Without:
  """A source without some of its tensors."""

  def __init__(self, source: Source, is_left_out: Callable[[str], bool]):
    self._source = source
    self._names = [n for n in source.names() if not is_left_out(n)]
    self.shape, self.dtype = source.shape, source.dtype
    self.read = source.read

  def names(self) -> Iterable[str]:
    return self._names


class Replaced:
  """A source of which some tensors are others, of the same shapes and types."""

  def __init__(self, source: Source, others: dict[str, np.ndarray]):
    self._source, self._others = source, others
    self.names, self.shape = source.names, source.shape
    self.dtype = source.dtype

  def read(self, name: str) -> np.ndarray:
    if name in self._others:
      return self._others[name]
    return self._source.read(name)


class SafetensorsSource:
  """A folder with model.safetensors, or with parts of it and an index.

  A file is open only while a tensor of it is read: the pages of a mapped file
  count as memory of this process until then.
  """

  def __init__(self, folder: pathlib.Path):
    """Reads the names, shapes and types of all tensors.

    Raises:
      UserError: there is no such file, one is missing, cut off or damaged, or
        the index and the files do not agree.
    """
    self._files: dict[str, pathlib.Path] = {}
    self._shapes: dict[str, tuple[int, ...]] = {}
    self._types: dict[str, str] = {}
    index = _read_index(folder)
    if not index and not (folder / WHOLE).is_file():
      _refuse_folder(folder)
    files = sorted(set(index.values())) or [WHOLE]
    gone = [file for file in files if not (folder / file).is_file()]
    require(
      not gone,
      f'{INDEX} names {", ".join(gone[:5])}, but {str(folder)!r} has no such '
      'file: fetch the checkpoint again.',
    )
    for file in files:
      self._add(folder / file, index)
    lost = [name for name in index if name not in self._files]
    require(
      not lost,
      f'{INDEX} names tensors that no file in {str(folder)!r} holds, such as '
      f'{", ".join(lost[:5])}: fetch the checkpoint again.',
    )

  def _add(self, path: pathlib.Path, index: dict[str, str]) -> None:
    with _opened(path) as file:
      for name in file.keys():  # noqa: SIM118, as the file is no mapping.
        if name in self._files or index.get(name, path.name) != path.name:
          raise UserError(
            f'{path.name} holds {name}, which {INDEX} says is elsewhere: fetch '
            'the checkpoint again.'
          )
        tensor = file.get_slice(name)
        self._files[name] = path
        self._shapes[name] = tuple(tensor.get_shape())
        self._types[name] = tensor.get_dtype()

  def names(self) -> Iterable[str]:
    return self._files.keys()

  def shape(self, name: str) -> tuple[int, ...]:
    return self._shapes[name]

  def dtype(self, name: str) -> str:
    return _TYPES.get(self._types[name], self._types[name])

  def read(self, name: str) -> np.ndarray:
    path = self._files[name]
    with _opened(path) as file:
      try:
        return file.get_tensor(name)
      except (safetensors.SafetensorError, TypeError, ValueError) as error:
        _refuse_file(path, error)


def _opened(path: pathlib.Path) -> Any:
  try:
    # Its first bytes say nothing where all of it is missing.
    return safetensors.safe_open(path, 'numpy')
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    _refuse_file(path, error)


def _refuse_file(path: pathlib.Path, error: Exception) -> NoReturn:
  raise UserError(
    f"{str(path)!r} can't be read as safetensors ({shown(str(error))[1:-1]}): "
    'it is cut off or damaged, so fetch it again.'
  ) from error


def _read_index(folder: pathlib.Path) -> dict[str, str]:
  """The file of each tensor; empty without an index."""
  path = folder / INDEX
  if not path.is_file():
    return {}
  try:
    found = json.loads(path.read_bytes())['weight_map']
    is_plain = all(
      isinstance(file, str) and pathlib.PurePath(file).name == file
      for file in found.values()
    )
  except (OSError, ValueError, RecursionError, LookupError, TypeError,
          AttributeError):  # fmt: skip
    is_plain = False
  require(
    is_plain and bool(found),
    f'{str(path)!r} must be a JSON object whose weight_map gives each tensor a '
    'file beside it, but is not: fetch it again.',
  )
  return found


def _refuse_folder(folder: pathlib.Path) -> NoReturn:
  pickles = sorted(p.name for form in _PICKLES for p in folder.glob(form))
  if pickles:
    raise UserError(
      f'{str(folder)!r} has its tensors as pickles only ({pickles[0]}), which '
      'are programs and are not run here: where torch is, write '
      f'{WHOLE} from it with safetensors.torch.save_file('
      'torch.load(FILE, weights_only=True), ...).'
    )
  raise UserError(
    f'{str(folder)!r} holds neither {WHOLE} nor {INDEX}: give the folder of a '
    'published checkpoint.'
  )
