# SPDX-License-Identifier: Apache-2.0
"""The peak of each kind of device; None where it would be a guess."""

import types

import jax
import pytest

from jaxsparse.analysis import hardware


@pytest.mark.parametrize(
  ('kind', 'tera'),
  [
    ('TPU v4', 275),
    ('TPU v5 lite', 197),
    ('TPU v5', 459),
    ('TPU v5p', 459),
    ('TPU v6 lite', 918),
    ('Tesla T4', 65),
    ('NVIDIA A100-SXM4-80GB', 312),
    ('NVIDIA H100 80GB HBM3', 989),
    ('NVIDIA H100 PCIe', 756),
    ('NVIDIA H200', 989),
    ('NVIDIA B200', 2250),
    ('NVIDIA GeForce GTX 1080', None),
    ('TPU v99', None),
  ],
)
def test_data_sheets(kind, tera):
  peak = hardware.data_sheet_flops(kind)
  assert peak == (None if tera is None else tera * 1e12)


def test_cpu_is_measured_once_and_shared_by_its_devices():
  peaks = {hardware.peak_flops(device) for device in jax.devices('cpu')}
  assert len(peaks) == 1
  # Between a pocket calculator and the largest host.
  assert 1e7 < peaks.pop() < 1e15


def test_utilisation_is_a_share_of_all_devices():
  peak = hardware.peak_flops()
  assert hardware.utilisation(4 * peak, 8) == pytest.approx(0.5)


@pytest.mark.parametrize(
  ('platform', 'more', 'dtype'),
  [
    ('cpu', {}, 'float32'),
    ('tpu', {}, 'bfloat16'),
    ('gpu', dict(compute_capability='7.5'), 'float16'),
    ('gpu', dict(compute_capability='8.0'), 'bfloat16'),
    ('gpu', dict(compute_capability='12.0'), 'bfloat16'),
    ('gpu', dict(compute_capability='gfx90a'), 'bfloat16'),
  ],
)
def test_the_dtype_that_a_device_has_units_for(platform, more, dtype):
  device = types.SimpleNamespace(platform=platform, **more)
  assert hardware.compute_dtype(device) == dtype
