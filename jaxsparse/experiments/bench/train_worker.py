# SPDX-License-Identifier: Apache-2.0
"""A process that trains one model and does as it is told: `bench train`'s.

  python -m jaxsparse.experiments.bench.train_worker CONTENDER SIZE

Reads a task and a number from each line of standard input, and answers with a
line of JSON, the seconds it took. The tasks: `train` (steps), `matmul` (square
float32 products of 1,024), `prefill` (a prompt for that many sequences) and
`decode` (tokens for that many sequences, each a call). The first line comes
unasked, when the first step is done.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from jaxsparse.config import Config, ModelConfig
from jaxsparse.experiments.bench import train_sizes

# Tokens of a prompt, and those that are decoded after it.
PROMPT, NEW = 64, 32

Task = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Tasks:
  """What a process can do, each of a number."""

  train: Task
  matmul: Task
  # Given how many sequences, they make ready what is timed.
  prefill: Callable[[int], Task]
  decode: Callable[[int], Task]

  def ready(self, name: str, number: int) -> Task:
    task = getattr(self, name)
    return task(number) if name in ('prefill', 'decode') else task


def main(argv: Sequence[str]) -> None:
  contender, size = argv
  config = train_sizes.config_of(contender, size)
  make = jax_tasks if contender.startswith('jaxsparse') else torch_tasks
  tasks = make(config, contender)
  tasks.train(1)
  print(json.dumps('ready'), flush=True)
  for line in sys.stdin:
    name, number = line.split()
    run = tasks.ready(name, int(number))
    start = time.perf_counter()
    run(int(number))
    print(json.dumps(time.perf_counter() - start), flush=True)


def draw_batches(config: Config) -> list[np.ndarray]:
  """Tokens and targets [2, B, T] of eight batches."""
  shape = (8, config.data.batch_size, config.data.seq_len + 1)
  tokens = np.random.default_rng(0).integers(
    config.model.vocab_size, size=shape
  )
  return [np.stack([b[:, :-1], b[:, 1:]]) for b in tokens.astype(np.int32)]


def jax_tasks(config: Config, contender: str) -> Tasks:
  """As the training loop and `generate` do it, on one device."""
  del contender
  import jax
  import jax.numpy as jnp

  from jaxsparse import mesh
  from jaxsparse.inference import decoding
  from jaxsparse.inference.sampling import Sampling
  from jaxsparse.nn.transformer import init_cache
  from jaxsparse.training.evaluation import to_global
  from jaxsparse.training.step import init_state, train_step

  jax.set_mesh(mesh.make_mesh(devices=jax.devices()[:1]))
  shape = (config.data.batch_size, config.data.seq_len)
  rest = dict(
    positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
    segment_ids=np.ones(shape, np.int32),
    loss_weight=np.ones(shape, np.float32),
  )
  batches = [
    to_global(dict(tokens=t, targets=y, **rest))
    for t, y in draw_batches(config)
  ]
  state = jax.jit(lambda: init_state(config))()
  step = jax.jit(
    lambda state, batch: train_step(config, state, batch), donate_argnums=0
  )

  def train(num_steps: int) -> None:
    nonlocal state
    for i in range(num_steps):
      state, metrics = step(state, batches[i % len(batches)])
    float(metrics['loss'])

  x = jnp.ones((1024, 1024))
  product = jax.jit(jnp.matmul)

  def matmul(number: int) -> None:
    for _ in range(number):
      y = product(x, x)
    y.block_until_ready()

  new_cache = jax.jit(init_cache, static_argnums=(0, 1, 2))
  greedy = Sampling(temperature=0.0)

  def prompt(batch_size: int):
    inputs = jax.device_put(decoding.left_pad([[1] * PROMPT] * batch_size))
    cache = new_cache(config.model, batch_size, PROMPT + NEW)
    return jax.block_until_ready((cache, inputs))

  def fed(cache, inputs, step):
    return decoding.decode_step(
      config.model, greedy, state.params, cache, inputs, 0, step
    )

  def prefill(batch_size: int):
    cache, inputs = prompt(batch_size)
    return lambda _: fed(cache, inputs, 0)[0].block_until_ready()

  def decode(batch_size: int):
    _, cache, inputs = fed(*prompt(batch_size), 0)

    def run(_: int) -> None:
      rest = cache, inputs
      for i in range(NEW):
        token, *rest = fed(*rest, i + 1)
      token.block_until_ready()

    return run

  return Tasks(train, matmul, prefill, decode)


def torch_tasks(config: Config, contender: str) -> Tasks:
  import torch

  from jaxsparse.experiments.bench import torch_dense

  model = torch_dense.make_model(config.model)
  step = torch_dense.make_step(
    model, config.optimizer, is_compiled=contender == 'torch.compile'
  )
  batches = [torch.tensor(b, dtype=torch.int64) for b in draw_batches(config)]

  def train(num_steps: int) -> None:
    for i in range(num_steps):
      loss = step(*batches[i % len(batches)])
    loss.item()

  x = torch.ones(1024, 1024)

  def matmul(number: int) -> None:
    for _ in range(number):
      x @ x

  def fed(tokens, caches, first):
    with torch.inference_mode():
      hidden = model(tokens, caches, first)
      return model.logits(hidden[:, -1:]).argmax(-1)

  def prompt(batch_size: int):
    caches = _torch_caches(config.model, batch_size)
    return torch.ones(batch_size, PROMPT, dtype=torch.int64), caches

  def prefill(batch_size: int):
    inputs = prompt(batch_size)
    return lambda _: fed(*inputs, 0)

  def decode(batch_size: int):
    tokens, caches = prompt(batch_size)
    first = fed(tokens, caches, 0)

    def run(_: int) -> None:
      token = first
      for i in range(NEW):
        token = fed(token, caches, PROMPT + i)

    return run

  return Tasks(train, matmul, prefill, decode)


def _torch_caches(config: ModelConfig, batch_size: int):
  import torch

  shape = (batch_size, config.num_heads, PROMPT + NEW, config.head_dim)
  return [
    (torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_layers)
  ]


if __name__ == '__main__':
  main(sys.argv[1:])
