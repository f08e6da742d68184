# SPDX-License-Identifier: Apache-2.0
"""A cell of the decode bench: all models at one batch size, taking turns."""

import argparse
import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.analysis import budget, cost, memory_cost
from jaxsparse.config import ModelConfig
from jaxsparse.experiments.bench import measuring
from jaxsparse.experiments.bench.decode_program import (
  compile_decode,
  draw_tokens,
  fill_cache,
  lower_decode,
)
from jaxsparse.inference.batch_rows import padded


class Cell:
  """All models at one batch size and number of KV heads.

  They take turns with one cache of keys and values, as it is the same for all.
  """

  def __init__(
    self,
    models: Mapping[str, ModelConfig],
    params: Mapping[str, dict],
    options: argparse.Namespace,
    batch_size: int,
    lowered: Mapping[str, jax.stages.Lowered] | None = None,
  ):
    """Compiles the programs.

    Args:
      models: by name.
      params: of each, as its program takes them.
      options: of the bench, see `decode.OPTIONS`.
      batch_size: sequences.
      lowered: programs of another cell that differs in `compiler_options` only.
    """
    self._models, self._params, self._options = models, params, options
    self._batch_size = batch_size
    self._rows = max(batch_size, options.least_rows or padded(batch_size))
    self._keys, self._contexts, self._picks = None, {}, {}
    self._vocab_size = next(iter(models.values())).vocab_size
    self._tokens = self._draw('uniform')
    self.lowered = dict(lowered or {})
    for i, (name, model) in enumerate(models.items()):
      self._keys, self._contexts[name] = fill_cache(
        model, self._rows, options.context + options.steps, self._keys
      )
      if self._rows > batch_size and i == 0:
        self._keys = _repeated(self._keys, batch_size)
      if name in self.lowered:
        continue
      cache = (self._keys, self._contexts[name])
      self.lowered[name] = lower_decode(
        model, params[name], cache, self._tokens, options.context
      )
    self._programs = measuring.in_threads(
      self._compile, dict(zip(self.lowered, self.lowered, strict=True))
    )

  def _compile(self, name):
    given = compiler_options(self._options.compiler_options)
    if folder := self._options.autotune:
      path = pathlib.Path(folder, f'{name}_{self._rows}.txt')
      given['xla_gpu_dump_autotune_results_to'] = str(path)
    return compile_decode(self.lowered[name], given)

  def _draw(self, routing):
    tokens = draw_tokens(
      routing, self._options.steps, self._batch_size, self._vocab_size
    )
    return jnp.resize(tokens.T, (self._rows, len(tokens))).T

  def take_turns(self, routing: str, least: bool = False) -> dict[str, float]:
    """Median or least seconds of all steps with tokens so drawn, by model."""
    return measuring.take_turns(
      self.contenders(routing), self._options.rounds, least
    )

  def contenders(self, routing: str) -> dict[str, measuring.Contender]:
    """All steps with tokens so drawn, by model."""
    self._tokens = self._draw(routing)
    return {
      name: measuring.Contender(
        lambda name=name: self._run(name, self._params[name])
      )
      for name in self._models
    }

  def _run(self, name, params):
    cache = (self._keys, self._contexts[name])
    cache, drawn, picks = self._programs[name](params, cache, self._tokens)
    self._keys, self._contexts[name] = cache
    self._picks[name] = picks
    return drawn

  def records(self, task: str, seconds: Mapping[str, float]) -> list[dict]:
    """What was measured and what follows from it, by model."""
    records = []
    for name, model in self._models.items():
      distinct = count_distinct(np.asarray(self._picks[name]))
      least = least_bytes(
        model,
        self._batch_size,
        # The mean over the steps.
        self._options.context + (self._options.steps + 1) // 2,
        distinct,
      )
      time = seconds[name] / self._options.steps
      memory = self._programs[name].memory_analysis()
      record = dict(
        task=task,
        contender=name,
        batch_size=self._batch_size,
        rows=self._rows,
        num_kv_heads=model.num_kv_heads,
        seconds=time,
        least_bytes=least.total,
        **{f'{n}_bytes': b for n, b in dataclasses.asdict(least).items()},
        distinct_per_layer=distinct / max(1, self._picks[name].shape[1]),
        bytes_per_second=least.total / time,
        share_of_copy=least.total / time / measuring.copy_bandwidth(),
        aliased_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        forward_flops=cost.forward_flops(model, self._options.context),
        parameters=cost.count_parameters(model).published,
        sizes=budget.describe(model),
      )
      records.append(record)
    return with_ratios(records)


def with_ratios(records: Sequence[dict]) -> list[dict]:
  """Records of a cell, with ratios to its dense model and its MoE."""
  of = {record['contender']: record for record in records}
  completed = []
  for record in records:
    ratios = {}
    if 'dense' in of:
      ratios['to_dense'] = record['seconds'] / of['dense']['seconds']
    if 'moe' in of:
      ratios['moe_ratio'] = of['moe']['seconds'] / record['seconds']
      ratios['moe_limit'] = of['moe']['least_bytes'] / record['least_bytes']
    completed.append(record | ratios)
  return completed


def count_distinct(picks: np.ndarray) -> float:
  """Different experts or slots of a step, all layers together; mean of steps.

  Args:
    picks: of all steps, layers and tokens [steps, layers, B, k].
  """
  counts = [len(np.unique(layer)) for step in picks for layer in step]
  return sum(counts) / len(picks)


def least_bytes(
  model: ModelConfig, batch_size: int, context: int, distinct: float
) -> cost.DecodeBytes:
  """Bytes that a step must read, with that many different experts or rows."""
  bytes_per_value = jnp.dtype(model.dtype).itemsize
  least = cost.decode_bytes(
    model, batch_size, context, bytes_per_value=bytes_per_value
  )
  if model.moe:
    one = memory_cost.expert_parameters(model.moe, model.mlp, model.model_dim)
    experts = float(bytes_per_value * distinct * one)
    return dataclasses.replace(least, experts=experts)
  if model.memory:
    memory = model.sized_memory
    width = memory.value_dim + memory.pre_value_dim
    bytes_per_entry = jnp.dtype(memory.table.dtype).itemsize
    values = float(bytes_per_entry * distinct * width)
    return dataclasses.replace(least, values=values)
  return least


def _repeated(cache, batch_size):
  """The cache with its first sequences again and again."""

  def repeat(x):
    return x if x.ndim == 0 else x[jnp.arange(len(x)) % batch_size]

  return jax.tree.map(repeat, cache)


def compiler_options(text: str) -> dict[str, str | bool]:
  """Options of XLA by name, from NAME=VALUE with commas between.

  What is before the first '=' is a name; a value may be several words with
  commas between.
  """
  pairs = re.split(r',(?=\w+=)', text) if text else []
  parts = [pair.partition('=') for pair in pairs]
  # XLA takes no truth values in letters.
  truth = dict(true=True, false=False)
  return {
    name if equals else '': truth.get(value, value)
    for name, equals, value in parts
  }
