# SPDX-License-Identifier: Apache-2.0
"""Decode programs of the bench's models, of fewer blocks, for an H100."""

import argparse
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import targets

from jaxsparse.config import ModelConfig
from jaxsparse.experiments.bench import decode, decode_models, decode_program
from jaxsparse.inference import batch_rows, slot_functions
from jaxsparse.inference.fold import fold_for_decode
from jaxsparse.inference.slot_model import SlotModel
from jaxsparse.nn.transformer import init_cache

CONTEXT, STEPS = 2048, 32


@functools.cache
def model(name: str, num_layers: int) -> ModelConfig:
  """Of the bench's 680M family, with one memory layer where it has some."""
  options = argparse.Namespace(
    **decode.OPTIONS
    | dict(
      family='680m',
      models=name,
      dtype='bfloat16',
      context=CONTEXT,
      width_multiple=64,
    )
  )
  config = decode_models.make_models(options, kv_group=8)[name]
  memory = config.memory and dataclasses.replace(
    config.memory, placements=((0, 1),)
  )
  return dataclasses.replace(config, num_layers=num_layers, memory=memory)


@functools.cache
def table_shape(name: str) -> tuple[int, ...]:
  """Of the value table of a model with one."""
  config = model(name, 2)
  with jax.set_mesh(targets.make_mesh('h100', (1, 1, 1))):
    params = jax.eval_shape(lambda: decode_models.draw_params(config))
  (shape,) = [
    x.shape
    for path, x in jax.tree.leaves_with_path(params)
    if path[-1].key == 'value_table'
  ]
  return shape


def cache_bytes(name: str, num_layers: int, batch_size: int) -> int:
  """Of all rows, which every step writes in place."""
  config = model(name, num_layers)
  with jax.set_mesh(targets.make_mesh('h100', (1, 1, 1))):
    cache = jax.eval_shape(
      lambda: init_cache(config, batch_size, CONTEXT + STEPS)
    )
  # All but the index, a number.
  return sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(cache) if x.ndim
  )


def compile_step(
  name: str,
  num_layers: int,
  batch_size: int,
  dump: pathlib.Path | None = None,
) -> targets.Program:
  """The loop over all steps, its cache donated; see `targets.compile_for`."""
  config = model(name, num_layers)
  with jax.set_mesh(targets.make_mesh('h100', (1, 1, 1))):
    params = jax.eval_shape(
      lambda: fold_for_decode(config, decode_models.draw_params(config))
    )
    cache = jax.eval_shape(
      lambda: decode_program.split(
        init_cache(config, batch_size, CONTEXT + STEPS)
      )
    )
  tokens = jax.ShapeDtypeStruct((STEPS, batch_size), jnp.int32)
  return targets.compile_for(
    'h100',
    decode_program.decode_steps(config, CONTEXT),
    params,
    cache,
    tokens,
    donate=(1,),
    dump=dump,
  )


def compile_answer(name: str, num_layers: int, num_texts: int):
  """A step of `generate` and of the server with room for so many texts."""
  config = model(name, num_layers)
  with jax.set_mesh(targets.make_mesh('h100', (1, 1, 1))):
    num_rows = batch_rows.padded(num_texts)
    params = jax.eval_shape(
      lambda: fold_for_decode(config, decode_models.draw_params(config))
    )
    state = jax.eval_shape(
      lambda: slot_functions.init(SlotModel(config), num_rows, CONTEXT + STEPS)
    )
  decode = functools.partial(
    slot_functions.decode, model=SlotModel(config), stop_ids=(), form='plain'
  )
  is_live = jax.ShapeDtypeStruct((num_rows,), jnp.bool_)
  return targets.compile_for(
    'h100', decode, state, params, is_live, donate=(0,)
  )
