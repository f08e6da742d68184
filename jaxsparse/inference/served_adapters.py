# SPDX-License-Identifier: Apache-2.0
"""Several adapters beside one model, of which each sequence has one or none.

There is a fixed number of places. Place 0 is the model itself; an adapter is in
one of the others, padded with zeros to the largest rank and the most rows, and
a program reads those of the places that its sequences have. So another adapter
takes a place without another program. One that is read again gets a place that
is free: who writes with the former goes on with it.

Letters: n places, R rank, t rows of a delta.
"""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxsparse.config.errors import UserError, require
from jaxsparse.inference import adapters
from jaxsparse.nn import adapters as trees
from jaxsparse.nn import row_deltas
from jaxsparse.ops.adapted_matrix import AdaptedMatrix
from jaxsparse.ops.tables.row_delta import DeltaTable
from jaxsparse.run import adapter_files

# That one server has.
MOST = 64

Path = trees.Path


class NoPlace(Exception):
  """Texts are being written in every place; whoever asked may ask again."""


@dataclasses.dataclass(frozen=True)
class Adapter:
  """An adapter as it was read from its folder.

  Attributes:
    name: by which it is asked for.
    version: differs where its numbers do.
    matrices: A [*input, R] and s B [R, *output] by path, s the adapter's scale.
    deltas: differences of rows by the path of their table.
  """

  name: str
  version: str
  matrices: dict[Path, tuple[np.ndarray, np.ndarray]]
  deltas: row_deltas.Deltas


def shapes_of(params: dict) -> dict:
  """Of all that an adapter is compared with; no array is kept."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    params,
    is_leaf=lambda x: hasattr(x, 'shape'),
  )


def read(
  name: str,
  folder: epath.PathLike,
  shapes: dict,
  base: str,
  is_forced: bool = False,
) -> Adapter:
  """An adapter of a folder, compared with the model.

  Args:
    name: by which it is to be asked for.
    folder: such as RUN/adapters/NAME.
    shapes: of the model, see `shapes_of`.
    base: the fingerprint of its parameters.
    is_forced: take an adapter of other parameters, too.

  Raises:
    UserError: there is none, it is damaged, of another base or model, or of a
      kind that can't be one of several.
  """
  where = str(folder)
  meta = adapter_files.read_meta(folder)
  adapter_files.require_base(folder, meta, base, is_forced)
  version = repr(sorted(meta.items()))
  if meta['kind'] == 'rows':
    tensors, _ = adapter_files.read(folder)
    deltas = row_deltas.from_tensors(tensors, shapes, where)
    return Adapter(name, version, {}, deltas)
  config, tree, _ = adapters.read(folder)
  trees.check(config, shapes, tree, where)
  require(
    not config.use_dora,
    f'the adapter in {where!r} is of DoRA, which scales the matrices of the '
    'model, so that it can be no one of several: serve its own run, which has '
    'it merged, or train one without use_dora.',
  )
  matrices = {}
  for path in {path[:-1] for path in trees.leaves(tree)}:
    matrix = trees.adapted(config, path, None, **trees.at(tree, path))
    require(
      not matrix.num_experts,
      f'the adapter in {where!r} has {"/".join(path)!r}, matrices of experts, '
      'which can be no one of several: leave them out of adapter.targets.',
    )
    b = np.asarray(matrix.b, np.float32) * matrix.scale
    matrices[path] = np.asarray(matrix.a, np.float32), b
  return Adapter(name, version, matrices, {})


class Places:
  """Which adapter is in which place, and who writes with it.

  Called in the engine's thread alone.

  Attributes:
    num_places: n.
  """

  def __init__(self, num_places: int):
    self.num_places = num_places
    # Of the adapters that are asked for, by name.
    self._current: dict[str, tuple[int, str]] = {}
    self._tenants: collections.Counter[int] = collections.Counter()

  def put(self, params: dict, adapter: Adapter) -> dict:
    """The parameters with an adapter in a place that is free.

    Those that were given are gone. Who enters by its name gets it.

    Args:
      params: with places, see `with_places`.
      adapter: what to put there.

    Raises:
      NoPlace: no place is free.
      UserError: it has more than the places have room for.
    """
    _check_room(params, adapter)
    taken = {place for place, _ in self._current.values()}
    free = (
      i
      for i in range(1, self.num_places)
      if i not in taken and not self._tenants[i]
    )
    place = next(free, None)
    if place is None:
      raise NoPlace(
        f'texts are still being written by the former {adapter.name!r}: try '
        'again when they are complete.'
      )
    self._current[adapter.name] = place, adapter.version
    return _put(params, np.int32(place), _padded(params, adapter))

  def has(self, name: str) -> bool:
    """Whether there is an adapter of that name; in any thread."""
    return name in self._current

  def enter(self, name: str) -> tuple[int, str]:
    """The place and the version of an adapter, for a text that begins."""
    place, version = self._current[name]
    self._tenants[place] += 1
    return place, version

  def leave(self, place: int) -> None:
    """A text has ended."""
    self._tenants[place] -= 1


def with_places(
  params: dict, given: Sequence[Adapter], dtype: jax.typing.DTypeLike
) -> tuple[dict, Places]:
  """Parameters with a place for each adapter and one that is free.

  Args:
    params: of the model, on one device.
    given: what the places have room for; each is put into one.
    dtype: of products of the model.

  Raises:
    UserError: a matrix has an adapter already.
  """
  places = Places(len(given) + 2)
  ranks: dict[Path, int] = {}
  sizes: dict[str, int] = {}
  for adapter in given:
    for path, (a, _) in adapter.matrices.items():
      ranks[path] = max(ranks.get(path, 0), a.shape[-1])
    for name, (rows, _) in adapter.deltas.items():
      # For one of somewhat more rows, too.
      size = 1 << (len(rows) - 1).bit_length()
      sizes[name] = max(sizes.get(name, 0), size)

  def on_leaf(path: Any, x: Any) -> Any:
    path = tuple(p.key for p in path)
    if path in ranks:
      return _matrix(path, x, places.num_places, ranks[path], dtype)
    if (name := '/'.join(path)) in sizes:
      return _table(x, places.num_places, sizes[name])
    return x

  params = jax.tree_util.tree_map_with_path(
    on_leaf, params, is_leaf=lambda x: hasattr(x, 'shape')
  )
  for adapter in given:
    params = places.put(params, adapter)
  return params, places


# Stands for `chosen` until a program says it.
_UNSAID = np.zeros(0, np.int32)


def _matrix(path, base, num_places, rank, dtype) -> AdaptedMatrix:
  require(
    not isinstance(base, AdaptedMatrix),
    f'{"/".join(path)} of the model is quantized and has an adapter, so that '
    'none can be beside it: serve the base, with all adapters by --adapters.',
  )
  empty = AdaptedMatrix(
    base, None, None, chosen=_UNSAID, contracted=trees.contracted(path)
  )
  shapes = empty.of_dims(base.shape, rank, num_places)
  return dataclasses.replace(
    empty,
    a=jnp.zeros(shapes['a'], dtype),
    b=jnp.zeros(shapes['b'], dtype),
    chosen=jnp.asarray(_UNSAID),
  )


def _table(base, num_places, size) -> DeltaTable:
  num_rows, width = base.shape
  return DeltaTable(
    base,
    jnp.full((num_places, size), num_rows, jnp.int32),
    jnp.zeros((num_places, size, width), jnp.float32),
    jnp.asarray(_UNSAID),
  )


def _has_places(x: Any) -> bool:
  return isinstance(x, AdaptedMatrix | DeltaTable) and x.chosen is not None


def _with_places(params: dict) -> dict[str, Any]:
  """What has places, by its path."""
  leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=_has_places)
  return {
    '/'.join(p.key for p in path): x for path, x in leaves if _has_places(x)
  }


def chosen_by(params: dict, place: jax.Array) -> dict:
  """The parameters as the sequences of a batch read them.

  Args:
    params: with places or without.
    place: int32 [B] of each sequence.
  """
  return jax.tree.map(
    lambda x: dataclasses.replace(x, chosen=place) if _has_places(x) else x,
    params,
    is_leaf=_has_places,
  )


def _check_room(params: dict, adapter: Adapter) -> None:
  known = _with_places(params)
  sizes = {'/'.join(p): a.shape[-1] for p, (a, _) in adapter.matrices.items()}
  sizes |= {name: len(rows) for name, (rows, _) in adapter.deltas.items()}
  # By name: a file's tensors come in no order, and a sentence should not.
  if missing := sorted(sizes.keys() - known.keys()):
    raise UserError(
      f'the adapter {adapter.name!r} has {missing[0]!r}, which none of those '
      'had that the server was started with: start it again.'
    )
  for name, size in sorted(sizes.items()):
    x = known[name]
    room = x.a.shape[-1] if isinstance(x, AdaptedMatrix) else x.rows.shape[1]
    what = 'rank' if isinstance(x, AdaptedMatrix) else 'rows'
    require(
      size <= room,
      f'the adapter {adapter.name!r} has {size:,} as the {what} of {name!r}, '
      f'and its place has room for {room:,}: start the server again.',
    )


Padded = dict[str, tuple[np.ndarray, np.ndarray]]


def _padded(params: dict, adapter: Adapter) -> Padded:
  """Of all that has places what the adapter has there, or zeros."""
  found: Padded = {}
  for name, x in _with_places(params).items():
    if isinstance(x, AdaptedMatrix):
      a, b = (np.zeros(of.shape[1:], of.dtype) for of in (x.a, x.b))
      if own := adapter.matrices.get(tuple(name.split('/'))):
        a[..., : own[0].shape[-1]], b[: len(own[1])] = own
      found[name] = a, b
    else:
      rows = np.full(x.rows.shape[1:], len(x), np.int32)
      values = np.zeros(x.values.shape[1:], np.float32)
      if name in adapter.deltas:
        own_rows, own_values = adapter.deltas[name]
        rows[: len(own_rows)] = own_rows
        values[: len(own_rows)] = own_values
      found[name] = rows, values
  return found


def _put(params: dict, place: np.ndarray, padded: Padded) -> dict:
  """The parameters with these arrays in one place."""

  def on_leaf(path: Any, x: Any) -> Any:
    if not _has_places(x):
      return x
    names = ('a', 'b') if isinstance(x, AdaptedMatrix) else ('rows', 'values')
    new = padded['/'.join(p.key for p in path)]
    held = (getattr(x, name) for name in names)
    put = [_written(old, place, of) for old, of in zip(held, new, strict=True)]
    return dataclasses.replace(x, **dict(zip(names, put, strict=True)))

  return jax.tree_util.tree_map_with_path(on_leaf, params, is_leaf=_has_places)


@functools.partial(jax.jit, donate_argnums=0)
def _written(stack: jax.Array, place: jax.Array, new: jax.Array) -> jax.Array:
  return stack.at[place].set(new)


def parse(entries: Sequence[str]) -> dict[str, str]:
  """What `--adapters NAME=DIR ...` says: folders by name.

  Raises:
    UserError: an entry is none, a name comes twice, or there are too many.
  """
  found: dict[str, str] = {}
  for entry in entries:
    name, sign, folder = entry.partition('=')
    require(
      bool(name and sign and folder),
      f'--adapters takes NAME=DIR, such as cats=runs/cats/adapters/cats, got '
      f'{entry!r}.',
    )
    require(
      name not in found,
      f'--adapters has {name!r} twice: give each a name of its own.',
    )
    found[name] = folder
  require(
    len(found) <= MOST,
    f'--adapters must be at most {MOST}, got {len(found)}: start more servers.',
  )
  return found


def check_names(adapters_: Mapping[str, str], model: str) -> None:
  """Refuses an adapter that has the model's name."""
  require(
    model not in adapters_,
    f'--adapters has {model!r}, which is the name of the model: give another, '
    'or name the model by --served-name.',
  )
