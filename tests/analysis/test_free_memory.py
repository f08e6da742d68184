# SPDX-License-Identifier: Apache-2.0
"""What the kernel and its control groups leave, from files as they write."""

import types

import jax
import pytest

from jaxsparse.analysis import free_memory

GIB = 2**30


def write(root, files):
  for name, text in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


KERNEL = {'proc/meminfo': 'MemTotal: 9 kB\nMemAvailable:   8388608 kB\n'}
OF_2 = 'sys/fs/cgroup/job/step/memory'
OF_1 = 'sys/fs/cgroup/memory/job/memory'


@pytest.mark.parametrize(
  ('files', 'expected'),
  [
    ({}, 8 * GIB),
    ({'proc/self/cgroup': '0::/\n'}, 8 * GIB),
    ({'proc/self/cgroup': '0::/gone/elsewhere\n'}, 8 * GIB),
    # Version 2: a group around that of the process has the tighter limit.
    (
      {
        'proc/self/cgroup': '0::/job/step\n',
        f'{OF_2}.max': 'max\n',
        f'{OF_2}.current': f'{GIB}\n',
        'sys/fs/cgroup/job/memory.max': f'{4 * GIB}\n',
        'sys/fs/cgroup/job/memory.current': f'{3 * GIB}\n',
        'sys/fs/cgroup/job/memory.stat': (
          f'anon 7\ninactive_file {GIB // 4}\nactive_file {GIB // 4}\n'
        ),
      },
      1.5 * GIB,
    ),
    # Version 1, with one hierarchy for each controller.
    (
      {
        'proc/self/cgroup': '7:cpu,cpuacct:/\n4:memory:/job\n0::/\n',
        f'{OF_1}.limit_in_bytes': f'{6 * GIB}\n',
        f'{OF_1}.usage_in_bytes': f'{4 * GIB}\n',
        f'{OF_1}.stat': f'inactive_file 1\ntotal_inactive_file {GIB}\n',
      },
      3 * GIB,
    ),
    # In a container, whose own group is mounted as the first one.
    (
      {
        'proc/self/cgroup': '0::/\n',
        'sys/fs/cgroup/memory.max': f'{2 * GIB}\n',
        'sys/fs/cgroup/memory.current': f'{3 * GIB}\n',
      },
      0,
    ),
  ],
)
def test_the_tightest_limit_counts(tmp_path, files, expected):
  write(tmp_path, KERNEL | files)
  assert free_memory.of_host(tmp_path) == expected


def test_without_such_files_it_is_what_is_built_in(tmp_path):
  assert free_memory.of_host(tmp_path) >= free_memory.of_host() > 0


def test_a_device_has_its_own(tmp_path):
  cpu = free_memory.of_device(jax.devices('cpu')[0])
  assert cpu == pytest.approx(free_memory.of_host(), rel=0.2)

  def device(stats):
    return types.SimpleNamespace(platform='gpu', memory_stats=lambda: stats)

  of = free_memory.of_device
  assert of(device(dict(bytes_limit=9, bytes_in_use=4))) == 5
  assert of(device(dict(bytes_limit=9, bytes_in_use=10))) == 0
  assert of(device(None)) is None


@pytest.mark.parametrize(
  ('num_bytes', 'words'),
  [
    (512, '0.5 KiB'),
    (3 * 2**19, '1.5 MiB'),
    (GIB, '1.0 GiB'),
    (5000 * 2**40, '5,000.0 TiB'),
  ],
)
def test_words(num_bytes, words):
  assert free_memory.words(num_bytes) == words
