# SPDX-License-Identifier: Apache-2.0
"""Adapters in folders, as runs leave them, of numbers that were drawn."""

import numpy as np

from jaxsparse.config import AdapterConfig
from jaxsparse.nn import adapters, row_deltas
from jaxsparse.run import adapter_files, stored


def write_lora(base, params, name, seed=0, deviation=0.3, **fields):
  """One beside the parameters of a workdir's step 3; returns its folder."""
  config = AdapterConfig(kind='lora', name=name, **fields)
  rng, tensors = np.random.default_rng(seed), {}
  for path, x in adapters.targets(config, params).items():
    matrix = adapters.adapted(config, path, x, a=None, b=None)
    for part, shape in matrix.of_dims(x.shape, config.rank, 1).items():
      if part != 'magnitude' or config.use_dora:
        drawn = rng.normal(0, deviation, shape)
        tensors['/'.join((*path, part))] = drawn.astype(np.float32)
  return _write(base, name, 'lora', tensors, config.to_json())


def write_rows(base, params, name, num_rows=20, seed=0, deviation=1.0):
  """Differences of some rows of each table; returns the folder."""
  rng, tensors = np.random.default_rng(seed), {}
  for path, x in row_deltas.tables(params).items():
    rows = rng.permutation(len(x))[:num_rows]
    values = rng.normal(0, deviation, (num_rows, x.shape[1]))
    tensors[f'{path}/rows'] = np.sort(rows).astype(np.int32)
    tensors[f'{path}/values'] = values.astype(np.float32)
  return _write(base, name, 'rows', tensors, {})


def _write(base, name, kind, tensors, settings):
  folder = adapter_files.folder_of(base, name)
  meta = dict(kind=kind, base=stored.params_fingerprint(base, 3), **settings)
  adapter_files.write(folder, tensors, meta)
  return str(folder)
