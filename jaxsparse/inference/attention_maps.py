# SPDX-License-Identifier: Apache-2.0
"""Attention maps of a text: weights, their gradients, and rollouts."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config import ModelConfig
from jaxsparse.config.model import block_name
from jaxsparse.nn.attention.maps import ATTENTION_PROBES, MAPS
from jaxsparse.nn.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerMaps:
  """One layer's attention to a text of T tokens."""

  # 'global', 'local' or 'sparse'.
  kind: str
  # Weights [N, T, T], queries before keys, and the gradient of the likeliest
  # next token's logit with respect to them.
  weights: np.ndarray
  gradient: np.ndarray
  # Of composed heads: the weights before composition.
  uncomposed: np.ndarray | None
  # Of a sparse layer, for each key/value head and tile: the 'block' of each
  # candidate, whether it 'is_kept', the number 'kept' and 'eligible', the
  # 'shares' of window, kept blocks and summaries; and the 'coverage' [T, K].
  choice: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Maps:
  """All layers', and the token that the model would write next."""

  layers: tuple[LayerMaps, ...]
  next_token: int
  next_probability: float


def extract_maps(config: ModelConfig, params: dict, tokens: np.ndarray) -> Maps:
  """The attention maps of one forward pass over a text.

  Args:
    config: of the model, with its vocabulary.
    params: its parameters.
    tokens: int [T], one document; memory grows with its square.
  """
  names = [block_name(i) for i in range(config.num_layers)]
  maps, gradients, logits = _read(config, params, jnp.asarray(tokens)[None])
  layers = []
  for i, name in enumerate(names):
    kind = config.attention_kinds[i]
    found = maps[name]['attention']
    found = found.get(kind, found)
    found = {name: np.asarray(x[0][0]) for name, x in found.items()}
    value = np.repeat(
      found.pop('value'), config.num_heads // config.num_kv_heads, axis=1
    )
    of_read = np.asarray(gradients[name]['attention']['read'][0])
    weights, uncomposed = found.pop('weights'), found.pop('uncomposed', None)
    layers.append(
      LayerMaps(
        kind=kind,
        weights=weights.swapaxes(0, 1),
        # What is read is the sum of weights times values.
        gradient=np.einsum('tnh,snh->nts', of_read, value),
        uncomposed=None if uncomposed is None else uncomposed.swapaxes(0, 1),
        choice=found,
      )
    )
  probabilities = np.asarray(jax.nn.softmax(logits))
  best = int(probabilities.argmax())
  return Maps(
    layers=tuple(layers),
    next_token=best,
    next_probability=float(probabilities[best]),
  )


@functools.partial(jax.jit, static_argnums=0)
def _read(config: ModelConfig, params: dict, tokens: jax.Array) -> Any:
  length = tokens.shape[1]
  inputs = (tokens, jnp.arange(length)[None], jnp.ones_like(tokens))
  shape = (1, length, config.num_heads, config.head_dim)
  probes = {
    block_name(i): dict(attention=dict(read=jnp.zeros(shape, config.dtype)))
    for i in range(config.num_layers)
  }

  def likeliest(probes):
    (logits, _, _), shown = Transformer(config).apply(
      {'params': params, ATTENTION_PROBES: probes}, *inputs, mutable=[MAPS]
    )
    return logits[0, -1].max(), (shown[MAPS], logits[0, -1])

  gradients, (maps, logits) = jax.grad(likeliest, has_aux=True)(probes)
  return maps, gradients, logits


def rollout(maps: Maps) -> np.ndarray:
  """Where each token's state comes from, if attention were all: [T, T].

  Heads are averaged, half of a state stays where it is, and layers are
  multiplied (Abnar and Zuidema 2020, arXiv:2005.00928). Rows have sum 1;
  negative weights of composed heads do not count.
  """
  length = maps.layers[0].weights.shape[-1]
  total = np.eye(length)
  for layer in maps.layers:
    mean = np.maximum(layer.weights.astype(np.float64), 0).mean(0)
    mean += np.eye(length) * max(mean.sum() / length, 1e-9)
    total = mean / mean.sum(-1, keepdims=True) @ total
  return total


def relevance(maps: Maps) -> np.ndarray:
  """What of the text speaks for the likeliest next token: [T, T].

  Weights count where more of them would raise its logit (Chefer et al. 2021,
  arXiv:2103.15679, eq. 5 and 6). The last row is the next token's.
  """
  total = np.eye(maps.layers[0].weights.shape[-1])
  for layer in maps.layers:
    product = layer.weights.astype(np.float64) * layer.gradient
    total = total + np.maximum(product, 0).mean(0) @ total
  return total


def grad_cam(maps: Maps) -> np.ndarray:
  """Grad-CAM++ of the weights for the likeliest next token: [T, T].

  Each head's weights, times how much they speak for the token (Chattopadhay et
  al. 2018, arXiv:1710.11063, with a map of weights in place of a convolution's
  channel); the mean of all layers.
  """
  total = np.zeros_like(maps.layers[0].weights[0], np.float64)
  for layer in maps.layers:
    weights = layer.weights.astype(np.float64)
    # alpha g = g^3 / (2 g^2 + S g^3) where the gradient g is positive; the sums
    # S of composed weights may not be.
    g = np.maximum(layer.gradient.astype(np.float64), 0)
    sums = np.maximum(weights.sum((1, 2), keepdims=True), 0)
    of_heads = (g / (2 + sums * g)).sum((1, 2))
    total += np.maximum(np.einsum('h,hts->ts', of_heads, weights), 0)
  return total / len(maps.layers)
