# SPDX-License-Identifier: Apache-2.0
"""Rounding of a model's matrices by what a text feeds them, see `rounding`.

Matrices of attention and MLPs, which all tokens pass. A text's inputs are those
of the model before it is quantized.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import require
from jaxsparse.inference.quantize import Path, Quantization, quantize
from jaxsparse.nn.transformer import Transformer
from jaxsparse.ops import quantized_matrix, token_product
from jaxsparse.ops.quantized_matrix import QuantizedMatrix
from jaxsparse.ops.rounding import round_by_inputs

# Sequences of one call.
_BATCH = 4


def windows(tokenizer: Any, text: str, length: int, name: str) -> np.ndarray:
  """A text's tokens in windows, each a document: int32 [N, length].

  The first of each is the boundary; the last window is padded with boundaries.

  Raises:
    UserError: the text is empty.
  """
  ids = np.asarray(tokenizer.encode(text), np.int32)
  require(len(ids) > 0, f'{name} must hold some text, but it is empty.')
  num_new = length - 1
  num_windows = math.ceil(len(ids) / num_new)
  rows = np.full((num_windows, length), tokenizer.boundary_id, np.int32)
  padded = np.full(num_windows * num_new, tokenizer.boundary_id, np.int32)
  padded[: len(ids)] = ids
  rows[:, 1:] = padded.reshape(num_windows, num_new)
  return rows


def quantize_by_text(
  config: ModelConfig, params: dict, how: Quantization, rows: np.ndarray
) -> dict:
  """`quantize`, of int4 matrices by the inputs that a text gives them.

  Args:
    config: of the model, with vocab_size set.
    params: floats, of it.
    how: with weights of 'int4'.
    rows: tokens of the text in sequences, int32 [N, T].

  Raises:
    UserError: as `quantize` does.
  """
  moments = moments_of_inputs(config, params, rows)

  def encode(
    path: Path, x: jax.Array, kind: str, contracted: tuple, group: int
  ) -> QuantizedMatrix:
    plain = quantized_matrix.encoded(x, kind, contracted, group)
    name = '/'.join(path)
    if name not in moments or plain.kind != 'int4':
      return plain
    shape, axis = x.shape, plain.axis
    flat = x.reshape(len(moments[name]), -1)
    codes, scale = round_by_inputs(flat, moments[name], plain.group)
    groups = (*shape[:axis], -1, plain.group, *shape[axis + 1 :])
    codes = jax.lax.bitcast_convert_type(codes.reshape(groups), jnp.uint8)
    return QuantizedMatrix(
      quantized_matrix.packed(codes, axis + 1),
      scale.reshape(plain.scale.shape),
      kind,
      axis,
    )

  return quantize(config, params, how, encode)


def moments_of_inputs(
  config: ModelConfig, params: Any, rows: np.ndarray
) -> dict[str, jax.Array]:
  """The sums of inputs times inputs [I, I] of matrices, by their paths."""
  total: dict[str, jax.Array] = {}
  for begin in range(0, len(rows), _BATCH):
    found = _moments(config, params, rows[begin : begin + _BATCH])
    total = {name: x + total[name] if total else x for name, x in found.items()}
  return total


@functools.partial(jax.jit, static_argnums=0)
def _moments(config, params, rows):
  seen: dict[str, jax.Array] = {}

  def on_product(name: str, letters: str, x: jax.Array) -> None:
    num_inputs = len(letters.split(',')[0])
    flat = x.astype(jnp.float32)
    flat = flat.reshape(-1, np.prod(x.shape[x.ndim - num_inputs :]))
    # Of a matrix that is used more than once, of all uses.
    seen[name] = seen.get(name, 0) + flat.T @ flat

  with token_product.observed(on_product):
    Transformer(config).apply({'params': params}, rows)
  return seen
