# SPDX-License-Identifier: Apache-2.0
"""Published checkpoints in miniature, and what an import of them gives."""

import functools
import pathlib

import jax
import numpy as np

import jaxsparse
from jaxsparse.cli import convert_from_hf
from jaxsparse.interop import importing

HF = pathlib.Path(__file__).parents[1] / 'fixtures' / 'hf'


def open_fixture(name):
  return convert_from_hf.open_path(HF / name)


def expected(name):
  """Token ids [B, T], and logits [B, T, V] of the official model in float64."""
  with np.load(HF / name / 'logits.npz') as content:
    return content['input_ids'], content['logits_f64']


def import_into(name, workdir):
  importing.import_model(open_fixture(name), workdir)
  return workdir


def loaded(workdir):
  """The imported model's parameters, and its logits as a function."""
  module, params = jaxsparse.load(workdir)
  return params, functools.partial(_logits, module)


@functools.partial(jax.jit, static_argnums=0)
def _logits(module, params, tokens):
  return module.apply({'params': params}, tokens)
