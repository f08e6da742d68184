# SPDX-License-Identifier: Apache-2.0
"""The validation pass: fixed, full, in nats per token and bits per byte."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse import mesh
from jaxsparse.config import Config
from jaxsparse.run.progress import Reporter
from jaxsparse.training.language import eval_step

# Compiled once for all passes of a run.
_evaluate = jax.jit(eval_step, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class Validation:
  """Result of a pass over the validation text."""

  # Nats per target.
  loss: float
  # Of the text itself, whatever the tokenizer; boundaries are paid for.
  bits_per_byte: float
  # Reads of every physical slot or expert, by layer: int64 [M].
  slot_counts: dict[str, np.ndarray]
  # Of the text that was learned before, if it is known.
  old: 'Validation | None' = None

  def told(self) -> str:
    told = f'validation loss {self.loss:.4f} nats/token  '
    told += f'{self.bits_per_byte:.4f} bits/byte'
    if self.old is not None:
      told += f'  old text {self.old.bits_per_byte:.4f} bits/byte'
    return told

  def scalars(self) -> dict[str, float]:
    found = {
      'validation_loss': self.loss,
      'validation_bits_per_byte': self.bits_per_byte,
    }
    if self.old is not None:
      found |= {f'old_{k}': x for k, x in self.old.scalars().items()}
    return found


def validate(
  config: Config,
  params: dict,
  batches: Iterable[dict[str, np.ndarray]],
  num_bytes: int,
  reporter: Reporter,
  is_to_stop: Callable[[], bool],
  compiles: bool = True,
) -> Validation | None:
  """Runs the pass; None if a signal stopped it.

  Args:
    config: of the run.
    params: on the mesh in use.
    batches: this process's rows of every batch.
    num_bytes: UTF-8 bytes of the whole validation text.
    reporter: shows the progress.
    is_to_stop: is asked before every batch.
    compiles: whether this is the first pass, for which the program is made.
  """
  nats, targets, counts = 0.0, 0.0, {}
  batches = list(batches)
  with reporter.steps(0, len(batches), 'validation', compiles):
    for index, batch in enumerate(batches):
      if is_to_stop():
        return None
      sums = jax.device_get(_evaluate(config, params, to_global(batch)))
      nats += float(sums['nats'])
      targets += float(sums['targets'])
      for layer, reads in sums['slot_counts'].items():
        counts[layer] = counts.get(layer, 0) + reads.astype(np.int64)
      reporter.show(index + 1, len(batches), {'loss': nats / targets})
  return Validation(nats / targets, nats / math.log(2) / num_bytes, counts)


def of_texts(
  config: Config,
  params: dict,
  texts: Sequence[tuple[Callable[[], Iterable[dict[str, np.ndarray]]], int]],
  reporter: Reporter,
  is_to_stop: Callable[[], bool],
  compiles: bool = True,
) -> Validation | None:
  """`validate` of a text, and of the one that was learned before, if given.

  Args:
    config: of the run.
    params: on the mesh in use.
    texts: what makes the batches, and bytes, of one text or of two.
    reporter: shows the progress.
    is_to_stop: is asked before every batch.
    compiles: whether this is the first pass.

  Returns:
    The result of the first text, which has that of the other; None if a signal
    stopped it.
  """
  results = []
  for batches, num_bytes in texts:
    result = validate(
      config, params, batches(), num_bytes, reporter, is_to_stop, compiles
    )
    if result is None:
      return None
    results.append(result)
    compiles = False
  return dataclasses.replace(results[0], old=(*results, None)[1])


def to_global(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """This process's rows as part of the global batch, on the mesh in use.

  With no mesh set they are the batch.
  """
  if mesh.act('B') is None:
    return jax.tree.map(jnp.asarray, batch)
  return {
    name: jax.make_array_from_process_local_data(rows_sharding(x.ndim), x)
    for name, x in batch.items()
  }


def rows_sharding(num_dims: int) -> jax.sharding.NamedSharding:
  """Of an array whose first dimension is that of the batch's rows."""
  spec = mesh.act('B' + '.' * (num_dims - 1))
  return jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec)
