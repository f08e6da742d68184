# SPDX-License-Identifier: Apache-2.0
"""What an import has left in a workdir, as a stranger's program loads it."""

import functools

import jax

import jaxsparse


def loaded(workdir):
  """The imported model's parameters, and its logits as a function."""
  module, params = jaxsparse.load(workdir)
  return params, functools.partial(_logits, module)


@functools.partial(jax.jit, static_argnums=0)
def _logits(module, params, tokens):
  return module.apply({'params': params}, tokens)
