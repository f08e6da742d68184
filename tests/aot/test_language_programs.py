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
from jaxsparse.training.step import eval_step, init_state, train_step

pytestmark = pytest.mark.aot

# JAX takes three quarters of the 80 GB, and a validation pass holds parameters.
_MOST_BYTES = 55e9


@pytest.fixture
def _as_on_a_gpu(monkeypatch):
  """What the library asks of the device before it takes its kernels."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(
    attention_libraries, '_compilation_error', lambda name, call: None
  )
  monkeypatch.setattr(
    grouped_matmul_libraries, 'unsupported_reason', lambda *args: None
  )


@pytest.mark.usefixtures('_as_on_a_gpu')
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
  print(
    model,
    f'{program.temp_bytes / 1e9:.1f} GB of temporaries,',
    f'{program.argument_bytes / 1e9:.1f} GB of arguments',
  )
  program = targets.compile_for(
    'h100', functools.partial(eval_step, config), state.params, batch
  )
  assert program.temp_bytes + program.argument_bytes < _MOST_BYTES
  print(f'validation: {program.temp_bytes / 1e9:.1f} GB of temporaries')
