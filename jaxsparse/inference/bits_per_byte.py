# SPDX-License-Identifier: Apache-2.0
"""What a text costs a model, in bits for each of its bytes."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config import ModelConfig
from jaxsparse.config.errors import require
from jaxsparse.nn.transformer import Transformer

# Logits of one call, at most.
_MOST_LOGITS = 1 << 24


def windows(
  tokenizer: Any, text: str, length: int, name: str = 'text'
) -> np.ndarray:
  """A text's tokens in windows, each a document: int32 [N, length + 1].

  The first of each is the boundary; the last window is padded with boundaries.

  Raises:
    UserError: the text is empty.
  """
  ids = np.asarray(tokenizer.encode(text), np.int32)
  require(len(ids) > 0, f'{name} must hold some text, but it is empty.')
  num_windows = math.ceil(len(ids) / length)
  rows = np.full((num_windows, length + 1), tokenizer.boundary_id, np.int32)
  padded = np.full(num_windows * length, tokenizer.boundary_id, np.int32)
  padded[: len(ids)] = ids
  rows[:, 1:] = padded.reshape(num_windows, length)
  return rows


def bits_per_byte(
  config: ModelConfig, params: dict, tokenizer: Any, text: str, length: int
) -> float:
  """Of all tokens of a text, in windows of `length` that begin anew.

  Args:
    config: with vocab_size set.
    params: of it, quantized or not.
    tokenizer: of the model.
    text: some.
    length: tokens of a window.
  """
  rows = windows(tokenizer, text, length)
  num_tokens = len(tokenizer.encode(text))
  batch_size = max(1, _MOST_LOGITS // (length * config.vocab_size))
  batch_size = min(batch_size, len(rows))
  nats = 0.0
  for begin in range(0, len(rows), batch_size):
    batch = rows[begin : begin + batch_size]
    count = np.clip(
      num_tokens - (begin + np.arange(len(batch))) * length, 0, length
    )
    missing = batch_size - len(batch)
    batch = np.pad(batch, ((0, missing), (0, 0)), mode='edge')
    count = np.pad(count, (0, missing)).astype(np.int32)
    nats += float(_nats(config, params, batch, count))
  return nats / math.log(2) / len(text.encode())


@functools.partial(jax.jit, static_argnums=0)
def _nats(config, params, rows, count):
  logits, _, _ = Transformer(config).apply({'params': params}, rows[:, :-1])
  log_probs = jax.nn.log_softmax(logits)
  of_next = jnp.take_along_axis(log_probs, rows[:, 1:, None], axis=-1)[..., 0]
  counts = jnp.arange(of_next.shape[1])[None] < count[:, None]
  return -jnp.where(counts, of_next, 0).sum()
