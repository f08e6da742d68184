# SPDX-License-Identifier: Apache-2.0
"""Compiles the training step while the first parameters are made."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np

from jaxsparse.config import Config
from jaxsparse.training.evaluation import rows_sharding
from jaxsparse.training.micro_batches import Batch


@contextlib.contextmanager
def compiling_beside(program: Callable, *args) -> Iterator[None]:
  """Within it `jax.jit`'s `program` is compiled by a thread; waits for its end.

  A later call with arrays like `args` then finds it compiled. What compiling
  raises, that call raises again.

  Args:
    program: what `jax.jit` returned.
    args: shapes, types and shardings, under the mesh in use.
  """
  if jax.process_count() > 1:
    # Processes of one run should compile in one order.
    yield
    return
  own_mesh = jax.sharding.get_mesh()

  def compile_it():
    with contextlib.suppress(Exception), jax.set_mesh(own_mesh):
      program.lower(*args).compile()

  thread = threading.Thread(target=compile_it, name='compiling')
  thread.start()
  try:
    yield
  finally:
    thread.join()


def abstract_batch(config: Config) -> Batch:
  """Shapes, types and shardings of a global batch, under the mesh in use."""
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=rows_sharding(len(shape)))
    for name, (shape, dtype) in batch_shapes(config).items()
  }


def batch_shapes(config: Config) -> dict[str, tuple[tuple[int, ...], type]]:
  """Shape and type of each array of a global batch."""
  rows, length = config.data.batch_size, config.data.seq_len
  ids = ('tokens', 'targets', 'positions', 'segment_ids')
  shapes = dict.fromkeys(ids, ((rows, length), np.int32))
  shapes['loss_weight'] = ((rows, length), np.float32)
  if config.multimodal:
    shapes['images'] = ((rows, *config.multimodal.image_shape), np.float32)
    shapes['item'] = ((rows,), np.int32)
  if config.data.distractors:
    for name in ('tokens', 'segment_ids'):
      shapes[f'wrong_{name}'] = shapes[name]
  return shapes
