# SPDX-License-Identifier: Apache-2.0
"""Runs of the command, in one process and in two that are one run."""

import json
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def start(recipe, workdir, num_devices, *flags):
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(num_devices),
  }
  return subprocess.Popen(
    [sys.executable, ROOT / 'train.py', f'--config={recipe}',
     f'--workdir={workdir}', *flags],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )  # fmt: skip


def start_two(recipe, workdir, num_devices, *flags):
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  flags = (*flags, f'--coordinator={address}', '--num_processes=2')
  return [
    start(recipe, workdir, num_devices, *flags, f'--process_id={i}')
    for i in range(2)
  ]


def finish(*processes):
  outputs = [process.communicate()[0] for process in processes]
  for process, output in zip(processes, outputs, strict=True):
    assert process.returncode == 0, output
  return outputs


def losses(workdir):
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().splitlines(True) if path.exists() else []
  # A kill may cut the last one short.
  rows = [json.loads(line) for line in lines if line.endswith('\n')]
  return {row['step']: row['loss'] for row in rows if 'loss' in row}
