# SPDX-License-Identifier: Apache-2.0
"""The programs of `bench gpu language` compile for an H100 and fit on one.

Run with `pytest -m aot`, extra `aot`.
"""

import argparse
import functools

import jax
import pytest
import targets

from jaxsparse.experiments.bench import language
from jaxsparse.ops.attention import libraries as attention_libraries
from jaxsparse.ops.experts import grouped_matmul_libraries
from jaxsparse.training.language import eval_step
from jaxsparse.training.step import init_state, train_step

pytestmark = pytest.mark.aot

# JAX takes three quarters of the 80 GB, and a validation pass holds parameters.
_MOST_BYTES = 55e9


@pytest.fixture
def _kernels_compile(monkeypatch):
  """What a device would be asked before its kernels are taken."""
  monkeypatch.setattr(
    attention_libraries, '_compilation_error', lambda name, call: None
  )
  monkeypatch.setattr(
    grouped_matmul_libraries, 'unsupported_reason', lambda *args: None
  )


@pytest.mark.usefixtures('_kernels_compile')
@pytest.mark.parametrize('model', language.OPTIONS['models'].split(','))
def test_a_train_step_fits(model):
  options = argparse.Namespace(**language.OPTIONS | dict(models=model))
  config = language.make_configs(options)[model]
  state = jax.eval_shape(functools.partial(init_state, config))
  batch = language.abstract_batch(config)
  program = targets.compile_for(
    'h100', functools.partial(train_step, config), state, batch, donate=(0,)
  )
  assert program.temp_bytes + program.argument_bytes < _MOST_BYTES
  program = targets.compile_for(
    'h100', functools.partial(eval_step, config), state.params, batch
  )
  assert program.temp_bytes + program.argument_bytes < _MOST_BYTES
