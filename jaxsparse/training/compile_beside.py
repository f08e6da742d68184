# SPDX-License-Identifier: Apache-2.0
"""Compiles the training step while the first parameters are made."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np

from jaxsparse import mesh
from jaxsparse.config import Config
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
  """Shapes, types and shardings of a global batch."""
  sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), mesh.act('BT'))
  types = dict.fromkeys(
    ('tokens', 'targets', 'positions', 'segment_ids'), np.int32
  ) | dict(loss_weight=np.float32)
  shape = (config.data.batch_size, config.data.seq_len)
  return {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for name, dtype in types.items()
  }
