# SPDX-License-Identifier: Apache-2.0
"""Where each of our leaves lies in the tensors of others.

One table serves both directions, as every entry is invertible. A tensor that
holds several leaves, such as queries, keys and values in one, has a part for
each; of all parts together every tensor is used exactly once.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from jaxsparse.config.errors import UserError, require
from jaxsparse.interop.source import Source

# Tensors that a sentence names.
_NAMED = 5

Index = tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class Part:
  """A tensor of others, or a part of it.

  Attributes:
    name: of the tensor.
    whole: its shape.
    view: a shape of the same size, in which `index` is meant; () for `whole`.
    index: of what is used; () for all.
  """

  name: str
  whole: tuple[int, ...]
  view: tuple[int, ...] = ()
  index: Index = ()

  def of(self, tensor: np.ndarray) -> np.ndarray:
    """The part of the tensor, by which it can be written, too."""
    return tensor.reshape(self.view or self.whole)[self.index]

  @property
  def shape(self) -> tuple[int, ...]:
    # No memory is behind it.
    return self.of(np.broadcast_to(np.int8(0), self.whole)).shape


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A leaf of ours and the parts that it is made of.

  Attributes:
    sources: the parts.
    to_ours: the leaf, of the parts.
    to_theirs: the parts, of the leaf.
  """

  sources: tuple[Part, ...]
  to_ours: Callable[[list[np.ndarray]], np.ndarray]
  to_theirs: Callable[[np.ndarray], list[np.ndarray]]


# By the path of the leaf, such as 'block_00/attention/query'.
Layout = dict[str, Leaf]


def as_is(part: Part, shape: Sequence[int] = ()) -> Leaf:
  """The same numbers in the same order, of another shape if one is given."""
  shape = tuple(shape) or part.shape
  return Leaf(
    (part,),
    lambda parts: parts[0].reshape(shape),
    lambda leaf: [leaf.reshape(part.shape)],
  )


def transposed(part: Part, shape: Sequence[int] = ()) -> Leaf:
  """A matrix [out, in] of others, [in, out] of ours.

  `shape` may split either of them, as [in, heads, width] does.
  """
  theirs = part.shape
  shape = tuple(shape) or theirs[::-1]
  return Leaf(
    (part,),
    lambda parts: parts[0].T.reshape(shape),
    lambda leaf: [leaf.reshape(theirs[::-1]).T],
  )


def stacked(leaves: Sequence[Leaf]) -> Leaf:
  """Leaves of one part each, such as of experts, along a new first axis."""
  return Leaf(
    tuple(leaf.sources[0] for leaf in leaves),
    lambda parts: np.stack(
      [leaf.to_ours([part]) for leaf, part in zip(leaves, parts, strict=True)]
    ),
    lambda stack: [
      leaf.to_theirs(one)[0] for leaf, one in zip(leaves, stack, strict=True)
    ],
  )


def read(source: Source, leaf: Leaf) -> np.ndarray:
  """The leaf as it is in a source, of the source's type.

  Raises:
    UserError: a tensor can't be read, or holds what is no number.
  """
  parts = []
  for part in leaf.sources:
    parts.append(part.of(source.read(part.name)))
    require(
      is_finite(parts[-1]),
      f'{part.name} holds what is not a finite number: the checkpoint is '
      'damaged, so fetch it again.',
    )
  return leaf.to_ours(parts)


def is_finite(tensor: np.ndarray) -> bool:
  # A sum in float64 is finite if all of its terms are.
  with np.errstate(invalid='ignore'):
    return bool(np.isfinite(np.sum(tensor, dtype=np.float64)))


def tensors(layout: Layout) -> dict[str, tuple[int, ...]]:
  """Shapes of the tensors that the layout's leaves make up, by their names.

  Raises:
    ValueError: a part is used twice or not at all, which a layout must not do.
  """
  shapes, used = {}, Counter()
  for leaf in layout.values():
    for part in leaf.sources:
      shapes[part.name] = part.whole
      used[part.name] += math.prod(part.shape)
  for name, shape in shapes.items():
    if used[name] != math.prod(shape):
      raise ValueError(
        f'{used[name]} of the {math.prod(shape)} numbers of {name} are used.'
      )
  return shapes


def check(source: Source, layout: Layout) -> None:
  """Compares names, shapes and types, before anything is read.

  Raises:
    UserError: a tensor is missing, left over, of another shape, or of a type
      that is not a plain float.
  """
  expected, found = tensors(layout), set(source.names())
  missing = [name for name in expected if name not in found]
  extra = sorted(found - expected.keys())
  if missing or extra:
    said = [
      f'{what} {_listed(names)}'
      for what, names in (('lacks', missing), ('also holds', extra))
      if names
    ]
    raise UserError(
      f'the checkpoint {" and ".join(said)}, so it is not the model of its '
      'config.'
    )
  for name, shape in expected.items():
    require(
      source.shape(name) == shape,
      f'{name} must have the shape {list(shape)} by the config, but has '
      f'{list(source.shape(name))}.',
    )
    require(
      source.dtype(name) in ('float64', 'float32', 'float16', 'bfloat16'),
      f'{name} must be of float32, float16 or bfloat16, but is of '
      f'{source.dtype(name)}: give the checkpoint that is not quantized.',
    )


def _listed(names: Iterable[str]) -> str:
  names = list(names)
  rest = len(names) - _NAMED
  more = f' and {rest} more' if rest > 0 else ''
  return ', '.join(names[:_NAMED]) + more
