# SPDX-License-Identifier: Apache-2.0
"""memory_layer: an UltraMem layer, forward and backward.

Beside it runs the same maths as one would first write it, in JAX, with `top_k`
and with a sort, and in PyTorch where that is installed.

Memory is given twice: temporaries of the compiled program, and on a CPU the
peak of a process that runs one contender alone.
"""

import argparse
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config import MemoryConfig
from jaxsparse.experiments.bench import measuring, memory_layer_peers
from jaxsparse.experiments.bench.measuring import Contender
from jaxsparse.nn.memory.init import initial_scales, parameters
from jaxsparse.nn.memory.layer import memory_forward
from jaxsparse.ops.memory.addressing import shuffle
from jaxsparse.ops.memory.tucker import leading_directions

OPTIONS = dict(
  tokens=512, model_dim=768, num_keys=808, key_dim=192, num_heads=2,
  num_selected=80, value_dim=384, expansion=4, rounds=5,
)  # fmt: skip

# The tasks, as tables show them.
PASSES = {
  'forward': 'forward',
  'backward': 'forward + backward',
  'backward_no_table': 'same, table fixed',
}


@dataclasses.dataclass(frozen=True)
class Problem:
  """Inputs that every contender gets, as NumPy arrays."""

  config: MemoryConfig
  params: dict[str, np.ndarray]
  x: np.ndarray
  permutation: np.ndarray


def make_problem(options: argparse.Namespace) -> Problem:
  """Random parameters at the scale of their initialisation."""
  sizes = {
    name: getattr(options, name)
    for name in OPTIONS
    if name not in ('tokens', 'model_dim', 'rounds')
  }
  config, model_dim = MemoryConfig(**sizes), options.model_dim
  rng = np.random.default_rng(0)
  scales = dataclasses.asdict(initial_scales(config, model_dim, 20))
  params = {}
  for name, (_, _, shape) in parameters(config, model_dim, 20).items():
    scale = np.float32(scales['values' if name == 'value_table' else name])
    if name.endswith('_scale'):
      params[name] = np.full(shape, scale)
    elif name == 'cores':
      params[name] = scale * rng.random(shape, dtype=np.float32)
    else:
      params[name] = scale * rng.standard_normal(shape, dtype=np.float32)
  x = rng.standard_normal((1, options.tokens, model_dim), dtype=np.float32)
  num_keys = config.num_logical_keys
  permutation = shuffle(jnp.arange(num_keys**2), num_keys, 0)
  return Problem(config, params, x, np.asarray(permutation))


# The contenders, each with a call for every pass.


def jaxsparse_passes(problem: Problem) -> dict[str, Contender]:
  def forward(params, x, permutation):
    return memory_forward(params, x, problem.config)[0]

  return _jax_passes(forward, problem)


def naive_passes(problem: Problem, use_sort: bool) -> dict[str, Contender]:
  def top(scores, m):
    if use_sort:
      return jnp.argsort(-scores, axis=-1)[..., :m]
    return jax.lax.top_k(scores, m)[1]

  def forward(params, x, permutation):
    return memory_layer_peers.naive_forward(
      params, x, permutation, problem.config, top
    )

  return _jax_passes(forward, problem)


def _jax_passes(forward, problem):
  def loss(trained, fixed, x, permutation):
    return (forward(trained | fixed, x, permutation) ** 2).sum()

  backward = jax.value_and_grad(loss, (0, 2))
  params = jax.tree.map(jnp.asarray, problem.params)
  table = {'value_table': params['value_table']}
  dense = {name: p for name, p in params.items() if name not in table}
  data = jnp.asarray(problem.x), jnp.asarray(problem.permutation)
  calls = {
    'forward': (forward, (params, *data)),
    'backward': (backward, (params, {}, *data)),
    'backward_no_table': (backward, (dense, table, *data)),
  }
  return {
    name: measuring.compiled(function, *args)
    for name, (function, args) in calls.items()
  }


def torch_passes(problem: Problem) -> dict[str, Contender]:
  import torch

  def tensor(x):
    return torch.tensor(x, device=measuring.torch_device())

  params = {n: tensor(p) for n, p in problem.params.items()}
  x, permutation = tensor(problem.x), tensor(problem.permutation)
  directions = leading_directions(jnp.asarray(problem.params['cores']).sum(0))
  u, t = (tensor(np.asarray(d)) for d in directions)

  def run(trained):
    for name, parameter in (params | {'x': x}).items():
      parameter.requires_grad_(name in trained)
      parameter.grad = None
    y = memory_layer_peers.torch_forward(
      torch, params, x, permutation, u, t, problem.config
    )
    if trained:
      (y**2).sum().backward()
    return y.detach().cpu().numpy()

  everything = {*params, 'x'}
  trained = {
    'forward': set(),
    'backward': everything,
    'backward_no_table': everything - {'value_table'},
  }
  return {
    name: measuring.by_torch(lambda names=names: run(names))
    for name, names in trained.items()
  }


def contenders() -> dict[str, Callable[[Problem], dict[str, Contender]]]:
  """Every contender that can run here, by name."""
  forms = {
    'jaxsparse': jaxsparse_passes,
    'naive jax, top_k': lambda problem: naive_passes(problem, False),
    'naive jax, sort': lambda problem: naive_passes(problem, True),
  }
  if measuring.has_torch():
    forms['naive torch'] = torch_passes
  return forms


def measure(options: argparse.Namespace) -> Iterator[dict]:
  """A record of each contender in each pass."""
  peaks = {name: peak_bytes(name, options) for name in contenders()}
  problem = make_problem(options)
  runs = {name: form(problem) for name, form in contenders().items()}
  for pass_name, task in PASSES.items():
    calls = {name: passes[pass_name] for name, passes in runs.items()}
    for record in measuring.compare(task, calls, options.rounds):
      if pass_name == 'backward':
        record['peak_bytes'] = peaks[record['contender']]
      yield record


def peak_bytes(name: str, options: argparse.Namespace) -> int | None:
  """Peak resident memory of a process that runs one contender's backward.

  None on an accelerator, whose memory this process has taken.
  """
  if jax.default_backend() != 'cpu':
    return None
  flags = [f'--{option}={getattr(options, option)}' for option in OPTIONS]
  command = [
    sys.executable,
    '-m',
    'jaxsparse.experiments.bench.peak_memory',
    name,
    *flags,
  ]
  output = subprocess.run(command, check=True, capture_output=True, text=True)
  return int(output.stdout.split()[-1])


show = measuring.print_last


def summarize(records: list[dict]) -> None:
  """Peak memory of the processes that ran one contender alone."""
  for record in records:
    if peak := record.get('peak_bytes'):
      print(f'{record["contender"]}: {peak / 1e6:.0f} MB of peak memory')
