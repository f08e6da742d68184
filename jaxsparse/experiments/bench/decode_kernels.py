# SPDX-License-Identifier: Apache-2.0
"""decode_kernels: each kernel of a decode step alone, beside XLA's form of it.

`retrieve` has a program for each token and head: 2, 128 and 512 of them at the
batches here. Times are of one call, in a program of --calls with inputs of
their own: by itself it would be shorter than its launch. The sizes are of the
680M family. Where there is no GPU the kernels are interpreted, which rehearses
the bench and measures nothing.
"""

import argparse
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsparse.experiments.bench import decode, measuring, switches
from jaxsparse.experiments.bench.decode_models import noise
from jaxsparse.ops.attention import rope
from jaxsparse.ops.kernels import attend, bag, retrieve
from jaxsparse.ops.memory.value_bag import value_bag

OPTIONS = dict(
  batches='1,64,256',
  rounds=7,
  calls=16,
  dtype='bfloat16',
  # Of `retrieve`.
  heads=2,
  keys=3264,
  selected=42,
  # Of `bag`.
  rows=2**20,
  width=768,
  pools=4,
  # Of `attend`.
  query_heads=16,
  kv_heads=2,
  head_dim=96,
  context=2048,
)

show = measuring.print_last


def measure(options: argparse.Namespace) -> Iterator[dict]:
  """Records of both forms of each kernel.

  Raises:
    UserError: an option has no sense.
  """
  table = noise((options.rows, options.width), jnp.dtype(options.dtype), 0, 1.0)
  for batch_size in decode.numbers(options, 'batches'):
    yield from _retrieve(options, batch_size)
    yield from _bag(options, table, batch_size)
    # As a decode step has it.
    yield from _attend(options, max(2, batch_size))


def _is_interpreted():
  return jax.default_backend() != 'gpu'


def _retrieve(options, batch_size):
  shape = (2, 2, batch_size, options.heads, options.keys)
  cores, *directions = (
    noise((*lead, options.heads, 2, *more), jnp.float32, i, 1.0)
    for i, (lead, more) in enumerate([((2,), (2,)), ((), ()), ((), ())])
  )
  factor = jnp.ones((batch_size, 2), jnp.float32)

  def form(function: Callable, **more: bool):
    def run(scores: Array):
      return function(
        scores,
        cores,
        tuple(directions),
        factor,
        options.selected,
        num_slots=options.keys**2 // 4,
        salt=1,
        **more,
      )

    return run

  inputs = [noise(shape, jnp.float32, 3 + i, 1.0) for i in range(options.calls)]
  return _both(
    f'retrieve, {batch_size * options.heads} programs',
    form(retrieve.retrieve, interpret=_is_interpreted()),
    form(retrieve.retrieve_reference),
    inputs,
    inputs[0].nbytes,
    options,
  )


def _bag(options, table, batch_size):
  entries = options.heads * options.selected
  shape = (batch_size, entries)

  def form(function: Callable, **more: bool):
    return lambda inputs: function(table, *inputs, options.pools, **more)

  inputs = []
  for i in range(options.calls):
    slot, pool = (
      (noise(shape, jnp.float32, seed, 1.0) * 2**20).astype(jnp.int32) % size
      for seed, size in ((2 * i, options.rows), (2 * i + 1, options.pools))
    )
    inputs.append((slot, noise((*shape, 2), jnp.float32, i, 1.0), pool))
  return _both(
    f'bag, batch {batch_size}',
    form(bag.bag, interpret=_is_interpreted()),
    form(value_bag),
    inputs,
    batch_size * entries * table.nbytes // len(table),
    options,
  )


def _attend(options, batch_size):
  """All calls in one cache, each after the one before."""
  dtype = jnp.dtype(options.dtype)
  heads = options.query_heads, options.kv_heads
  shape = (batch_size, heads[1], options.context + 32, options.head_dim)
  frequency = jnp.asarray(rope.frequencies(options.head_dim))
  index = jnp.full(batch_size, options.context, jnp.int32)
  width = (heads[0] + 2 * heads[1]) * options.head_dim
  inputs = [
    noise((batch_size, width), dtype, i, 1.0) for i in range(options.calls)
  ]

  def form(function: Callable, **more: bool):
    def run(cache: tuple[Array, Array], inputs: list[Array]):
      sums = []
      for qkv in inputs:
        out, *cache = function(
          qkv, frequency, *cache, index, index, heads[0], **more
        )
        sums.append(out)
      return tuple(cache), sums

    cache = tuple(noise(shape, dtype, i, 1.0) for i in range(2))
    program = jax.jit(run, donate_argnums=0).lower(cache, inputs).compile()

    def call():
      nonlocal cache
      cache, sums = program(cache, inputs)
      return sums

    temp_bytes = program.memory_analysis().temp_size_in_bytes
    return measuring.Contender(call, temp_bytes=temp_bytes)

  contenders = {
    'kernel': form(attend.attend, interpret=_is_interpreted()),
    'XLA': form(attend.attend_reference),
  }
  least = 2 * batch_size * heads[1] * options.context * options.head_dim
  return _compared(
    f'attend, batch {batch_size}', contenders, least * dtype.itemsize, options
  )


def _both(task, kernel, reference, inputs, least_bytes, options):
  def all_of(form: Callable):
    return lambda inputs: [form(one) for one in inputs]

  contenders = dict(kernel=measuring.compiled(all_of(kernel), inputs))
  with switches.without(*switches.KERNELS):
    contenders['XLA'] = measuring.compiled(all_of(reference), inputs)
  return _compared(task, contenders, least_bytes, options)


def _compared(task, contenders, least_bytes, options):
  calls = options.calls
  return [
    record
    | dict(
      seconds=record['seconds'] / calls, least_bytes=least_bytes, calls=calls
    )
    for record in measuring.compare(
      task, contenders, options.rounds, calls * least_bytes
    )
  ]
