# SPDX-License-Identifier: Apache-2.0
"""Compiles for H100, T4 and TPU on a machine that has none of them.

Both compilers run without their hardware, given a description of it. What they
make is what a device would execute: its kernels, temporaries, transfers. How
long that takes it does not tell, and no autotuning takes place.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable

import jax
import pytest
from jax.experimental import topologies

from jaxsparse import mesh as mesh_lib

# The TPU library would ask a cloud's metadata server what machine this is, and
# keep a second process, such as another worker of the tests, from loading it.
os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

NAMES = ('h100', 't4', 'v5e', 'v6e')

_CUDA = ('jax_cuda12_plugin', 'nvidia')
_PACKAGES = dict(h100=_CUDA, t4=_CUDA, v5e=('libtpu',), v6e=('libtpu',))

# From data sheets, as XLA's target descriptions.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

# Compute capability 7.5: no units for bfloat16.
_T4 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 65536
  shared_memory_per_block_optin: 65536
  threads_per_core_limit: 1024
  core_count: 40
  fpus_per_core: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 320064000000
  l2_cache_size: 4194304
  clock_rate_ghz: 1.59
  device_memory_size: 15835660288
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 7 minor: 5 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 }
device_description_str: "Tesla T4"
"""

_GPUS = dict(h100=_H100, t4=_T4)

_RESULTS = pathlib.Path(__file__).parents[2] / 'results'


@dataclasses.dataclass(frozen=True)
class Program:
  """What came out of a compiler."""

  text: str  # optimized HLO
  ptx: str  # of all kernels; empty unless asked for, and on TPU
  thunks: str  # likewise: what XLA runs step by step; from JAX 0.11 on
  temp_bytes: int
  argument_bytes: int
  output_bytes: int
  alias_bytes: int


def compile_for(
  name: str,
  function: Callable,
  *args,
  sizes: tuple[int, int, int] = (1, 1, 1),
  donate: tuple[int, ...] = (),
  dump: pathlib.Path | None = None,
) -> Program:
  """The program of `function(*args)` for a mesh of the target's devices.

  Args:
    name: one of `NAMES`; the test skips if its compiler is not installed.
    args: trees of `jax.ShapeDtypeStruct`; whole on every device where they have
      no sharding.
    sizes: of the mesh's axes, up to 8 devices in all.
    donate: positions of arguments that the program may overwrite.
    dump: folder, empty, to which kernels are written to be read as PTX.
  """
  mesh = make_mesh(name, sizes)

  def place(x):
    spec = jax.P() if x.sharding is None else x.sharding.spec
    sharding = jax.sharding.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  # Leaves only: JAX would describe the arguments by dataclasses of ours with
  # objects that their types do not allow.
  leaves, tree = jax.tree.flatten(jax.tree.map(place, args))
  owner = [i for i, arg in enumerate(args) for _ in jax.tree.leaves(arg)]
  donated = [i for i, arg in enumerate(owner) if arg in donate]

  def of_leaves(*leaves):
    return jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))

  with jax.set_mesh(mesh):
    lowered = jax.jit(of_leaves, donate_argnums=donated).lower(*leaves)
    compiled = lowered.compile(compiler_options=_options(name, dump))
  memory = compiled.memory_analysis()
  return Program(
    text=compiled.as_text(),
    ptx=_dumped(dump, '*.ptx'),
    thunks=_dumped(dump, '*thunk_sequence_after_thunk_passes.txt'),
    temp_bytes=memory.temp_size_in_bytes,
    argument_bytes=memory.argument_size_in_bytes,
    output_bytes=memory.output_size_in_bytes,
    alias_bytes=memory.alias_size_in_bytes,
  )


def tuned_file(
  name: str, results: pathlib.Path = _RESULTS
) -> pathlib.Path | None:
  """What a device's autotuner has chosen, if there is such a file.

  `bench gpu decode --autotune=results/autotune_NAME` leaves a file for each
  program, each with all that its process has found so far. XLA reads one in a
  process, and looks a product up by its shapes and by the device's clock, cores
  and memory, which have to be those of the target.
  """
  files = results.glob(f'autotune_{name}/*.txt')
  return max(files, key=lambda path: path.stat().st_size, default=None)


def _dumped(dump: pathlib.Path | None, pattern: str) -> str:
  return '\n'.join(p.read_text() for p in dump.glob(pattern)) if dump else ''


def make_mesh(name: str, sizes: tuple[int, int, int]) -> jax.sharding.Mesh:
  num_devices = sizes[0] * sizes[1] * sizes[2]
  return mesh_lib.make_mesh(*sizes, devices=_devices(name)[:num_devices])


@functools.cache
def _devices(name: str) -> list:
  for package in _PACKAGES[name]:
    if importlib.util.find_spec(package) is None:
      pytest.skip(
        f'Compiling for {name} takes the extra aot: '
        "pip install -e '.[test,aot]'."
      )
  jax.devices()  # loads the plugins
  if name in _GPUS:
    topology = topologies.get_topology_desc(
      platform='cuda',
      topology_name=name,
      topology='1x1x8',
      target_config=_GPUS[name],
    )
  else:
    topology = topologies.get_topology_desc(
      platform='tpu', topology_name=f'{name}:2x4'
    )
  return topology.devices


def _options(name: str, dump: pathlib.Path | None) -> dict:
  if name not in _GPUS:
    return {}
  # The suite's XLA_FLAGS turn optimization off.
  options = {'xla_backend_optimization_level': 3}
  if tuned := tuned_file(name):
    options['xla_gpu_load_autotune_results_from'] = str(tuned)
  if dump is not None:
    options['xla_dump_to'] = str(dump)
    if jax.__version_info__ >= (0, 11):
      options['xla_dump_emitter_re'] = '.*'
  return options
