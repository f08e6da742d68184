# SPDX-License-Identifier: Apache-2.0
"""train_step: a step of training, with a small value table and a larger one.

Same tokens, so the same number of rows is read; what grows is the table, and by
its root the number of keys, which are scored and are trained densely. With
an optimizer that touches every value the step's time follows the table, with
one that touches rows it follows what is read.

Bytes per table value, parameter and optimizer state together, are given twice:
by counting the state's arrays, and by what the compiled step takes as
arguments, without what is not of the table.
"""

import argparse
import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jaxsparse import config as config_lib
from jaxsparse.config import Config
from jaxsparse.config.errors import UserError
from jaxsparse.experiments.bench import measuring
from jaxsparse.run import command_line
from jaxsparse.training.step import TrainState, init_state, train_step

OPTIMIZERS = ('adamw', 'row_adam', 'lazy_row_adam', 'row_adagrad')

OPTIONS = dict(
  # A recipe; without one, a small model of our own.
  config='',
  # Value optimizers, with commas between.
  optimizers=','.join(OPTIMIZERS),
  # Tokens of a step, in sequences of seq_len.
  tokens=256,
  seq_len=64,
  # Sub-keys a side of the small table; 0: the recipe's.
  num_keys=0,
  # How many times larger the other table is; a square.
  growth=64,
  rounds=5,
)


def measure(options: argparse.Namespace) -> Iterator[dict]:
  """Records of every optimizer with both tables; ratios are to the small."""
  for optimizer in options.optimizers.split(','):
    tables = (1, options.growth) if options.growth > 1 else (1,)
    runs = {x: Run(make_config(options, optimizer, x)) for x in tables}
    contenders = {f'{x}x table': run.contender for x, run in runs.items()}
    compared = measuring.compare(optimizer, contenders, options.rounds)
    for record, run in zip(compared, runs.values(), strict=True):
      yield record | run.bytes_per_value()


def make_config(
  options: argparse.Namespace, optimizer: str, growth: int
) -> Config:
  """The config of one run, its table `growth` times larger.

  Raises:
    UserError: the recipe has no memory layers, or `growth` is no square.
  """
  config = _recipe(options.config)
  memory = config.model.memory
  if memory is None:
    raise UserError(
      f'--config={options.config} has no memory layers: name a recipe with '
      'value tables, such as ultramem:tiny.'
    )
  factor = math.isqrt(growth)
  if factor**2 != growth:
    raise UserError(f'--growth={growth} must be a square, such as 64.')
  memory.num_keys = (options.num_keys or memory.num_keys) * factor
  config.model.vocab_size = config.model.vocab_size or 256
  config.data.seq_len = options.seq_len
  config.data.batch_size = max(1, options.tokens // options.seq_len)
  config.optimizer.grad_accumulation = 1
  config.optimizer.value_optimizer = optimizer
  return config_lib.validated(config)


def _recipe(path: str) -> Config:
  if path:
    return command_line.read_recipe(path)
  memory = config_lib.MemoryConfig(
    num_keys=128,
    key_dim=32,
    num_selected=16,
    value_dim=128,
    placements=((1, 2),),
  )
  return Config(
    model=config_lib.ModelConfig(
      num_layers=4,
      model_dim=512,
      num_heads=8,
      num_kv_heads=8,
      head_dim=64,
      mlp_dim=2048,
      memory=memory,
    )
  )


def _draw_state(config: Config) -> TrainState:
  """A state of the right shapes, without compiling the model for it.

  Matrices are random: memory layers read all over their tables.
  """
  shapes = jax.eval_shape(lambda: init_state(config))

  def draw(path, x):
    key = jax.random.key(len(jax.tree_util.keystr(path)))
    if x.ndim < 2:
      return jnp.ones(x.shape, x.dtype)
    return (0.1 * jax.random.normal(key, x.shape)).astype(x.dtype)

  return dataclasses.replace(
    jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
    params=jax.tree_util.tree_map_with_path(draw, shapes.params),
  )


class Run:
  """A compiled step and the state that it takes from call to call."""

  def __init__(self, config: Config):
    state = _draw_state(config)
    key = jax.random.key(0)
    shape = (config.data.batch_size, config.data.seq_len)
    tokens = jax.random.randint(key, shape, 0, config.model.vocab_size)
    self._batch = dict(
      tokens=tokens,
      targets=jnp.roll(tokens, -1, axis=1),
      positions=jnp.broadcast_to(jnp.arange(shape[1])[None], shape),
      segment_ids=jnp.ones(shape, jnp.int32),
      loss_weight=jnp.ones(shape),
    )
    # Leaves, as a compiled program describes its arguments in their place.
    self._leaves, structure = jax.tree.flatten(state)

    def step(leaves, batch):
      state = jax.tree.unflatten(structure, leaves)
      state, metrics = train_step(config, state, batch)
      return jax.tree.leaves(state), metrics

    step = jax.jit(step, donate_argnums=0)
    self._program = step.lower(self._leaves, self._batch).compile()
    self._memory = self._program.memory_analysis()
    self._counted = count_table_bytes(state)
    self._num_bytes = sum(
      x.nbytes for x in jax.tree.leaves((state, self._batch))
    )
    self.contender = measuring.Contender(
      self._next, temp_bytes=self._memory.temp_size_in_bytes
    )

  def _next(self):
    self._leaves, metrics = self._program(self._leaves, self._batch)
    return metrics

  def bytes_per_value(self) -> dict:
    num_bytes, num_values = self._counted
    others = self._num_bytes - num_bytes
    compiled = self._memory.argument_size_in_bytes - others
    return dict(
      num_values=num_values,
      bytes_per_value=num_bytes / num_values,
      compiled_bytes_per_value=compiled / num_values,
    )


def count_table_bytes(state: TrainState) -> tuple[int, int]:
  """Bytes of value tables and their optimizer state; number of values."""

  def table_leaves(tree, *names):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    keys = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    return [leaf for key, leaf in keys if any(name in key for name in names)]

  tables = table_leaves(state.params, 'value_table')
  # Optimizers by rows keep what they know of tables apart.
  kept = table_leaves(state.opt_state, 'value_table')
  num_bytes = sum(x.nbytes for x in tables + kept)
  return num_bytes, sum(x.size for x in tables)


show = measuring.print_last


def summarize(records: list[dict]) -> None:
  print(f'{"":<36}{"":<26}{"values":>12}{"bytes a value":>16}{"compiled":>10}')
  for r in records:
    print(
      f'{r["task"]:<36}{r["contender"]:<26}{r["num_values"] / 1e6:>10.1f} M'
      f'{r["bytes_per_value"]:>16.2f}{r["compiled_bytes_per_value"]:>10.2f}'
    )
