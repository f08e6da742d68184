# SPDX-License-Identifier: Apache-2.0
"""One block of the language model: attention, then an MLP or its like.

A memory layer with the placement (i, j) reads what the MLP of block i reads and
is added to the residual stream after block j: its lookup can run beside the
blocks between (arXiv:2411.12364, section 3.2). Several may be in flight at
once.
"""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.nn.attention.layer import Attention
from jaxsparse.nn.experts import MoE
from jaxsparse.nn.layers import LOSSES, MLP, NORMS, Metrics, dropout
from jaxsparse.nn.leading import Leading
from jaxsparse.nn.memory.context import look_back
from jaxsparse.nn.memory.layer import Awaited, MemoryLayer
from jaxsparse.nn.memory.tables import Tables
from jaxsparse.ops.attention import slot_rows

# Modules of layers beside the MLP, by the field of `ModelConfig` that holds
# their `BesideMLP`; docs/guides/new_layer.md makes one. They are made by
# `module(config, dtype=dtype, name=field)`, take what the MLP reads [B, T, D]
# and segment_ids [B, T], and return what to add to it, and metrics.
BESIDE_MLP: dict[str, type[nn.Module]] = {}

# What all layers share, and one entry for each block.
Cache = dict


def placements(config: ModelConfig) -> tuple[tuple[int, int], ...]:
  return config.memory.placements if config.memory else ()


class Block(nn.Module):
  """Attention, then an MLP and, where a placement reads, a memory beside it.

  The memory layer's output is returned apart: its place in the residual stream
  may be after a later block, which gets it as `arriving`. It is added to the
  MLP's while both are partial sums over `model`, so a memory layer costs no
  collective there.
  """

  config: ModelConfig
  index: int
  deterministic: bool = True

  @nn.compact
  def __call__(
    self,
    x: Num[Array, '*S D'],
    positions: Int[Array, '*S'] | Int[Array, '*S 2'],
    segment_ids: Int[Array, '*S'],
    cache: Cache | None = None,
    arriving: tuple[Float[Array, '*S D'] | Awaited, ...] = (),
    tables: Tables | None = None,
    reach: Int[Array, '*S'] | None = None,
  ) -> tuple[
    Float[Array, '*S D'],
    Float[Array, '*S D'] | Awaited | None,
    Cache | None,
    Metrics,
  ]:
    lead = Leading.of(x)
    x, memory_y, new_cache, metrics = self._run(
      lead.flat(x),
      lead.flat(positions, 'positions'),
      lead.flat(segment_ids, 'segment_ids'),
      None if lead.is_empty else cache,
      tuple(
        y if isinstance(y, Awaited) else lead.flat(y, 'arriving')
        for y in arriving
      ),
      tables,
      lead.flat(reach, 'reach'),
    )
    if memory_y is not None and not isinstance(memory_y, Awaited):
      memory_y = lead.restored(memory_y)
    cache = cache if lead.is_empty else new_cache
    return lead.restored(x), memory_y, cache, lead.metrics(metrics)

  def _run(self, x, positions, segment_ids, cache, arriving, tables, reach):
    """`__call__` of sequences [B, T, D]."""
    config = self.config
    cache = {} if cache is None else cache
    index = cache['attention']['index'] if cache else None
    norm = functools.partial(
      NORMS[config.norm], epsilon=config.norm_epsilon, dtype=config.dtype
    )
    attention_norm = norm(name='attention_norm')
    mlp_norm = norm(name='mlp_norm')
    is_post = config.norm_placement == 'post'
    y, of_attention, metrics = Attention(config, self.index, name='attention')(
      x if is_post else attention_norm(x),
      positions,
      segment_ids,
      cache.get('attention'),
      reach,
    )
    y = attention_norm(y) if is_post else y
    before, x = x, x + self._drop(y)
    h = before if config.parallel_block else x
    h = h if is_post else mlp_norm(h)
    has_slots = bool(cache) and slot_rows.has_slots(cache['attention'])
    outputs, channel_metrics = self._channel_mixer(h, segment_ids, has_slots)
    outputs = [mlp_norm(y) for y in outputs] if is_post else outputs
    outputs = [self._drop(y) for y in outputs]
    metrics = merged(prefixed('attention', metrics), channel_metrics)
    for name, part in config.beside_mlp.items():
      if self.index in part.blocks:
        layer = BESIDE_MLP[name](part, dtype=config.dtype, name=name)
        y, layer_metrics = layer(h, segment_ids)
        outputs.append(self._drop(y))
        metrics = merged(metrics, prefixed(name, layer_metrics))
    cache = cache | dict(attention=of_attention) if cache else None
    memory_y = None
    write = dict(placements(config)).get(self.index)
    if write is not None:
      memory_y, cache, memory_metrics = self._memory(
        h, index, positions, segment_ids, cache, tables
      )
      if not isinstance(memory_y, Awaited):
        memory_y = self._drop(memory_y)
      metrics = merged(metrics, prefixed('memory', memory_metrics))
    outputs += [
      y.after(jax.lax.stop_gradient(h)) if isinstance(y, Awaited) else y
      for y in arriving
    ]
    if write == self.index:
      outputs, memory_y = [*outputs, memory_y], None
    y = functools.reduce(operator.add, outputs)
    return x + mesh.reshard(y, mesh.act('BTD')), memory_y, cache, metrics

  def _channel_mixer(self, h, segment_ids, has_slots):
    """Outputs of the MLP or the experts, none where a memory replaces it."""
    config = self.config
    inputs = (h,)
    if config.moe:
      inputs = (h, segment_ids)
      name, layer = (
        'moe',
        functools.partial(MoE, config.moe, skips_padding=has_slots),
      )
    else:
      name = 'mlp'
      layer = functools.partial(
        MLP,
        config.mlp_dim,
        deviations=config.init_deviations,
        use_bias=config.bias == 'all',
      )
    has_memory = self.index in dict(placements(config))
    if has_memory and config.memory.replaces_mlp:
      return [], {}
    y, metrics = layer(
      config.mlp,
      config.num_layers,
      config.dtype,
      is_partial=self._is_partial,
      name=name,
    )(*inputs)
    return [y], prefixed(name, metrics)

  def _memory(self, h, index, positions, segment_ids, cache, tables):
    """What is read at inputs from the index on."""
    config = self.config
    reads = [read for read, _ in placements(config)]
    stride = config.memory.shared_rows // len(reads)
    memory = MemoryLayer(
      config.memory,
      config.num_layers,
      jnp.dtype(config.dtype),
      salt=self.index,
      first_row=reads.index(self.index) * stride,
      is_partial=self._is_partial,
      name='memory',
    )
    # What a function of its own returns, as for recomputation, is arrays.
    is_dropped = not self.deterministic and config.dropout_rate
    is_later = dict(placements(config))[self.index] > self.index
    is_later &= not (config.use_remat or is_dropped)
    memory = functools.partial(memory, tables=tables, is_for_later=is_later)
    if cache is None or 'memory' not in cache:
      y, metrics = memory(h, segment_ids)
      return y, cache, metrics
    context, ring = look_back(cache['memory'], h, index, positions, segment_ids)
    y, metrics = memory(h, segment_ids, context)
    return y, cache | dict(memory=ring), metrics

  @property
  def _is_partial(self) -> bool:
    """Whether sums over `model` wait.

    Dropout needs them before its mask, a bias before it is added and a norm for
    its mean, and what a memory without an output map returns is no such sum.
    """
    config, memory = self.config, self.config.memory
    has_sums = memory is None or memory.output_map
    is_plain = self.deterministic or not config.dropout_rate
    is_plain &= config.norm_placement == 'pre' and config.bias != 'all'
    return has_sums and is_plain

  def _drop(self, y: jax.Array) -> jax.Array:
    if self.deterministic or not self.config.dropout_rate:
      return y
    return dropout(y, self.config.dropout_rate, self.make_rng('dropout'))


def merged(metrics: Metrics, others: Metrics) -> Metrics:
  """All of both; the parts of the loss among them are added."""
  both = metrics | others
  for name in LOSSES & metrics.keys() & others.keys():
    both[name] = metrics[name] + others[name]
  return both


def prefixed(prefix: str, metrics: Metrics) -> Metrics:
  """Metrics under their layer's name; parts of the loss keep their own."""
  return {
    name if name in LOSSES else f'{prefix}/{name}': value
    for name, value in metrics.items()
  }
