"""How fast and how large: `python -m jaxsparse.bench memory_layer`.

memory_layer: an UltraMem layer, forward and backward, beside the same maths as
one would first write it: all m x m cells of every core scored and kept for the
backward pass, all selected rows gathered into one array, plain autodiff. It is
written so in JAX, with `top_k` and with a sort, and in PyTorch where that is
installed. The contenders take turns, round by round; the table shows medians.

Memory is told twice: temporaries of the compiled program, and the peak of a
process that runs one contender alone.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.command_line import user_errors_end_in_a_sentence
from jaxsparse.config import UltraMemConfig
from jaxsparse.nn.ultramem import ultramem_forward
from jaxsparse.nn.ultramem_init import initial_scales, parameters
from jaxsparse.ops.addressing import shuffle
from jaxsparse.ops.tucker import leading_directions

PASSES = ('forward', 'backward', 'backward_no_table')
COLUMNS = {
  'forward': 'forward',
  'backward': 'forward + backward',
  'backward_no_table': 'same, table fixed',
}
EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class Problem:
  """Inputs that every contender gets, as NumPy arrays."""

  config: UltraMemConfig
  params: dict[str, np.ndarray]
  x: np.ndarray
  permutation: np.ndarray


def make_problem(config: UltraMemConfig, model_dim: int, num_tokens: int):
  """Random parameters at the scale of their initialisation."""
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
  x = rng.standard_normal((1, num_tokens, model_dim), dtype=np.float32)
  num_keys = config.num_logical_keys
  permutation = shuffle(jnp.arange(num_keys**2), num_keys, 0)
  return Problem(config, params, x, np.asarray(permutation))


# The contenders: pass -> a function that runs it once and waits.


def jaxsparse_passes(problem: Problem) -> dict[str, Callable]:
  def forward(params, x, permutation):
    return ultramem_forward(params, x, problem.config)[0]

  return _jax_passes(forward, problem)


def naive_passes(problem: Problem, use_sort: bool) -> dict[str, Callable]:
  def top(scores, m):
    if use_sort:
      return jnp.argsort(-scores, axis=-1)[..., :m]
    return jax.lax.top_k(scores, m)[1]

  def forward(params, x, permutation):
    return naive_forward(params, x, permutation, problem.config, top)

  return _jax_passes(forward, problem)


def _jax_passes(forward, problem):
  def loss(trained, fixed, x, permutation):
    return (forward(trained | fixed, x, permutation) ** 2).sum()

  run = jax.jit(forward)
  run_backward = jax.jit(jax.value_and_grad(loss, (0, 2)))
  params = jax.tree.map(jnp.asarray, problem.params)
  table = {'value_table': params['value_table']}
  dense = {name: p for name, p in params.items() if name not in table}
  data = jnp.asarray(problem.x), jnp.asarray(problem.permutation)
  calls = {
    'forward': (run, (params, *data)),
    'backward': (run_backward, (params, {}, *data)),
    'backward_no_table': (run_backward, (dense, table, *data)),
  }
  return {name: _compiled(*call) for name, call in calls.items()}


def _compiled(function, args):
  compiled = function.lower(*args).compile()

  def run():
    return jax.block_until_ready(compiled(*args))

  run.temp_bytes = compiled.memory_analysis().temp_size_in_bytes
  return run


def naive_forward(params, x, permutation, config, top):
  """The layer written down step by step; E, P and c as in `nn.ultramem`."""
  m, Q = config.num_selected, config.num_logical_keys
  T = x.shape[1]
  query = jnp.einsum('td,dsk->tsk', x[0], params['query'])
  query /= jnp.sqrt(jnp.mean(query**2, -1, keepdims=True) + EPSILON)
  query *= params['query_scale'][None, None]
  keys = params['keys']
  keys /= jnp.sqrt(jnp.mean(keys**2, -2, keepdims=True) + EPSILON)
  keys *= params['key_scale'][None, None, None, :, None]
  row, column = jnp.einsum('tsk,hsqkr->sthqr', query, keys)
  u, t = leading_directions(jax.lax.stop_gradient(params['cores'].sum(0)))
  i = top(jnp.einsum('thqr,hr->thq', row, u), m)
  j = top(jnp.einsum('thqr,hr->thq', column, t), m)
  row = jnp.take_along_axis(row, i[..., None], axis=2)
  column = jnp.take_along_axis(column, j[..., None], axis=2)
  grid = jnp.einsum('thip,chpq,thjq->thijc', row, params['cores'], column)
  grid = grid.reshape(*grid.shape[:2], m * m, -1)
  cell = top(grid.sum(-1), m)
  scores = jnp.take_along_axis(grid, cell[..., None], axis=2)
  i = jnp.take_along_axis(i, cell // m, axis=2)
  j = jnp.take_along_axis(j, cell % m, axis=2)
  virtual = permutation[i * Q + j].reshape(T, -1)
  block, slot = virtual // config.num_slots, virtual % config.num_slots
  scores = scores.reshape(*slot.shape, -1)
  rows = params['value_table'][slot].reshape(*scores.shape, -1)
  one_hot = jax.nn.one_hot(block, config.expansion)
  pooled = jnp.einsum('tkc,tke,tkcw->tecw', scores, one_hot, rows)
  pooled = pooled.reshape(T, config.expansion, -1)
  return jnp.einsum('tew,ewd->td', pooled, params['output'])[None]


def torch_passes(problem: Problem) -> dict[str, Callable]:
  import torch

  params = {n: torch.tensor(p) for n, p in problem.params.items()}
  x, permutation = torch.tensor(problem.x), torch.tensor(problem.permutation)
  directions = leading_directions(jnp.asarray(problem.params['cores']).sum(0))
  u, t = (torch.tensor(np.asarray(d)) for d in directions)

  def run(trained):
    for name, parameter in (params | {'x': x}).items():
      parameter.requires_grad_(name in trained)
      parameter.grad = None
    y = _torch_forward(torch, params, x, permutation, u, t, problem.config)
    if trained:
      (y**2).sum().backward()
    return y.detach().numpy()

  everything = {*params, 'x'}
  trained = {
    'forward': set(),
    'backward': everything,
    'backward_no_table': everything - {'value_table'},
  }
  return {name: lambda s=names: run(s) for name, names in trained.items()}


def _torch_forward(torch, params, x, permutation, u, t, config):
  m, Q = config.num_selected, config.num_logical_keys
  query = torch.einsum('td,dsk->tsk', x[0], params['query'])
  query = query * (query.square().mean(-1, True) + EPSILON).rsqrt()
  query = query * params['query_scale']
  keys = params['keys']
  keys = keys * (keys.square().mean(-2, True) + EPSILON).rsqrt()
  keys = keys * params['key_scale'][:, None]
  row, column = torch.einsum('tsk,hsqkr->sthqr', query, keys)
  i = torch.einsum('thqr,hr->thq', row, u).topk(m).indices
  j = torch.einsum('thqr,hr->thq', column, t).topk(m).indices
  rank = row.shape[-1]
  row = row.gather(2, i[..., None].expand(-1, -1, -1, rank))
  column = column.gather(2, j[..., None].expand(-1, -1, -1, rank))
  left = torch.einsum('thip,chpq->cthiq', row, params['cores'])
  grid = torch.einsum('cthiq,thjq->cthij', left, column).flatten(3)
  cell = grid.sum(0).topk(m).indices
  scores = grid.gather(3, cell.expand(len(grid), -1, -1, -1))
  i, j = i.gather(2, cell // m), j.gather(2, cell % m)
  virtual = permutation[i * Q + j].flatten(1).long()
  block, slot = virtual // config.num_slots, virtual % config.num_slots
  scores = scores.permute(1, 2, 3, 0).flatten(1, 2)
  rows = params['value_table'][slot].unflatten(2, (scores.shape[2], -1))
  one_hot = torch.nn.functional.one_hot(block, config.expansion).float()
  weights = scores[:, :, None] * one_hot[..., None]
  pooled = torch.einsum('tkec,tkcw->tecw', weights, rows).flatten(2)
  return torch.einsum('tew,ewd->td', pooled, params['output'])[None]


def contenders() -> dict[str, Callable[[Problem], dict[str, Callable]]]:
  """Every contender that can run here, by name."""
  forms = {
    'jaxsparse': jaxsparse_passes,
    'naive jax, top_k': lambda problem: naive_passes(problem, False),
    'naive jax, sort': lambda problem: naive_passes(problem, True),
  }
  if importlib.util.find_spec('torch'):
    forms['naive torch'] = torch_passes
  return forms


# Measuring.


def copy_bandwidth() -> float:
  """Bytes read and written per second by a copy of 256 MB."""
  x = jnp.ones(2**26, jnp.float32)
  copy = jax.jit(lambda x: x + 1)
  copy(x).block_until_ready()
  times = []
  for _ in range(5):
    start = time.perf_counter()
    copy(x).block_until_ready()
    times.append(time.perf_counter() - start)
  return 2 * x.nbytes / min(times)


def describe_machine() -> list[str]:
  device = jax.devices()[0]
  names = [n for n in ('jax', 'jaxlib', 'torch') if importlib.util.find_spec(n)]
  versions = ', '.join(f'{n} {importlib.metadata.version(n)}' for n in names)
  return [
    f'device: {device.device_kind} ({device.platform}, {len(jax.devices())})',
    f'versions: python {sys.version.split()[0]}, {versions}',
    f'copy bandwidth: {copy_bandwidth() / 1e9:.1f} GB/s',
  ]


def measure(problem: Problem, names: Sequence[str], num_rounds: int) -> dict:
  """Median seconds of each pass, contenders taking turns; temporaries."""
  runs = {name: contenders()[name](problem) for name in names}
  results = {name: {} for name in names}
  for pass_name in PASSES:
    times = {name: [] for name in names}
    for i in range(num_rounds + 1):
      for name in names:
        start = time.perf_counter()
        runs[name][pass_name]()
        if i > 0:
          times[name].append(time.perf_counter() - start)
    for name in names:
      results[name][pass_name] = statistics.median(times[name])
  for name in names:
    temp = getattr(runs[name]['backward'], 'temp_bytes', None)
    results[name]['temp_bytes'] = temp
  return results


def peak_bytes(name: str, argv: Sequence[str]) -> int:
  """Peak resident memory of a process that runs one contender's backward."""
  command = [sys.executable, '-m', 'jaxsparse.bench', *argv]
  output = subprocess.run(
    [*command, '--peak_of', name], check=True, capture_output=True, text=True
  ).stdout
  return int(output.split()[-1])


def print_table(results: dict[str, dict]) -> None:
  print(f'{"contender":<18}', end='')
  for title in COLUMNS.values():
    print(f'{title:>22}', end='')
  print(f'{"temporaries":>14}{"peak memory":>14}')
  best = results['jaxsparse']
  for name, row in results.items():
    print(f'{name:<18}', end='')
    for column in COLUMNS:
      ratio = row[column] / best[column]
      print(f'{row[column] * 1e3:>11.0f} ms {ratio:>6.1f}x', end=' ')
    temp = row['temp_bytes']
    temp = 'n/a' if temp is None else f'{temp / 1e6:.0f} MB'
    print(f'{temp:>14}{row["peak_bytes"] / 1e6:>11.0f} MB')


def _parse(argv):
  parser = argparse.ArgumentParser(prog='jaxsparse.bench', description=__doc__)
  parser.add_argument('bench', choices=['memory_layer'])
  for name, default in dict(
    tokens=512, model_dim=768, num_keys=808, key_dim=192, num_heads=2,
    num_selected=80, value_dim=384, expansion=4, rounds=5,
  ).items():  # fmt: skip
    parser.add_argument(f'--{name}', type=int, default=default)
  parser.add_argument('--json', default='', help='file for the results')
  parser.add_argument('--peak_of', default='', help=argparse.SUPPRESS)
  return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
  args = _parse(argv)
  config = UltraMemConfig(
    num_keys=args.num_keys,
    key_dim=args.key_dim,
    num_heads=args.num_heads,
    num_selected=args.num_selected,
    value_dim=args.value_dim,
    expansion=args.expansion,
  )
  if args.peak_of:
    problem = make_problem(config, args.model_dim, args.tokens)
    contenders()[args.peak_of](problem)['backward']()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return
  machine = describe_machine()
  print(*machine, sep='\n')
  table_bytes = math.prod((config.num_slots, config.value_dim, 4))
  print(f'value table, and its dense gradient: {table_bytes / 1e6:.0f} MB each')
  names = list(contenders())
  peaks = {name: peak_bytes(name, argv) for name in names}
  problem = make_problem(config, args.model_dim, args.tokens)
  results = measure(problem, names, args.rounds)
  for name in names:
    results[name]['peak_bytes'] = peaks[name]
  print_table(results)
  if args.json:
    arguments = {k: v for k, v in vars(args).items() if isinstance(v, int)}
    report = dict(machine=machine, arguments=arguments, results=results)
    pathlib.Path(args.json).write_text(json.dumps(report, indent=2))


if __name__ == '__main__':
  with user_errors_end_in_a_sentence():
    main(sys.argv[1:])
