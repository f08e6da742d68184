# SPDX-License-Identifier: Apache-2.0
"""What devices multiply in and how fast, the denominator of utilisation."""

import functools
import time

import jax
import jax.numpy as jnp

# FLOP/s of dense 16-bit products with f32 accumulation, from the vendors' data
# sheets, by how `device_kind` begins in lower case; the longest match counts.
PEAK_FLOPS = {
  'tpu v4': 275e12,
  'tpu v5 lite': 197e12,
  'tpu v5e': 197e12,
  'tpu v5': 459e12,
  'tpu v5p': 459e12,
  'tpu v6 lite': 918e12,
  'tpu v6e': 918e12,
  'tesla t4': 65e12,
  'nvidia a100': 312e12,
  'nvidia h100 80gb hbm3': 989e12,
  'nvidia h100 pcie': 756e12,
  'nvidia h100 nvl': 835e12,
  'nvidia h200': 989e12,
  'nvidia h200 nvl': 835e12,
  'nvidia b200': 2250e12,
}


def peak_flops(device: jax.Device | None = None) -> float | None:
  """FLOP/s that one device can reach, or None where it is not known.

  Accelerators: the data sheet. A CPU has no sheet that fits, so that its speed
  is measured once; forced CPU devices share the cores and get equal parts.
  """
  device = device or jax.local_devices()[0]
  if device.platform == 'cpu':
    return _measured_cpu_flops() / jax.local_device_count('cpu')
  return data_sheet_flops(device.device_kind)


def data_sheet_flops(device_kind: str) -> float | None:
  """The data sheet's FLOP/s of an accelerator, None where we have none."""
  kind = device_kind.lower()
  matches = [name for name in PEAK_FLOPS if kind.startswith(name)]
  return PEAK_FLOPS[max(matches, key=len)] if matches else None


def compute_dtype(device: jax.Device | None = None) -> str:
  """The `model.dtype` in which a device multiplies fastest.

  'float16' on a GPU without units for bfloat16, those of NVIDIA before compute
  capability 8.0, such as a T4; 'float32' on a CPU.
  """
  device = device or jax.local_devices()[0]
  if device.platform == 'cpu':
    return 'float32'
  # '7.5'; of AMD's GPUs 'gfx90a', and a TPU has none.
  capability = getattr(device, 'compute_capability', '')
  major = capability.partition('.')[0]
  return 'float16' if major.isdecimal() and int(major) < 8 else 'bfloat16'


def utilisation(
  flops_per_second: float, num_devices: int, device: jax.Device | None = None
) -> float | None:
  """Share of the devices' peak, or None where the peak is unknown."""
  peak = peak_flops(device)
  return None if peak is None else flops_per_second / (num_devices * peak)


@functools.cache
def _measured_cpu_flops(size: int = 768, budget_s: float = 0.05) -> float:
  """Best of the f32 products that fit into about `budget_s` seconds."""
  with jax.default_device(jax.local_devices(backend='cpu')[0]):
    x = jnp.full((size, size), 0.5, jnp.float32)
    multiply = jax.jit(jnp.matmul)
    multiply(x, x).block_until_ready()
    best, end = float('inf'), time.perf_counter() + budget_s
    while time.perf_counter() < end or best == float('inf'):
      start = time.perf_counter()
      multiply(x, x).block_until_ready()
      best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best
