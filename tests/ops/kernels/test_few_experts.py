# SPDX-License-Identifier: Apache-2.0
"""Experts in two kernels, interpreted on a CPU, are the reference's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few

from jaxsparse import mesh
from jaxsparse.ops.experts.expert_mlp import expert_mlp, expert_mlp_reference
from jaxsparse.ops.kernels import few_experts as kernel
from jaxsparse.ops.kernels import probe
from jaxsparse.ops.quantized_matrix import QuantizedMatrix

X, D, F = 5, 32, 48


def make_inputs(num_tokens, per_token, has_gate):
  rng = np.random.default_rng(0)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  order = [rng.permutation(X)[:per_token] for _ in range(num_tokens)]
  matrices = dict(up=draw(X, D, F), down=draw(X, F, D) / 4)
  if has_gate:
    matrices['gate'] = draw(X, D, F)
  weights = jnp.abs(draw(num_tokens, per_token))
  return draw(num_tokens, D), weights, jnp.asarray(order, 'int32'), matrices


CASES = [
  # Tokens, experts of each, whether gated, the form of GELU.
  (40, 2, False, 'tanh'),
  (1, 2, True, 'tanh'),
  (3, 1, False, 'erf'),
]


@pytest.mark.parametrize(
  ('num_tokens', 'per_token', 'has_gate', 'gelu'), few(CASES[:2], CASES)
)
def test_it_is_the_reference(num_tokens, per_token, has_gate, gelu):
  inputs = make_inputs(num_tokens, per_token, has_gate)

  @jax.jit
  def both(*inputs):
    got = kernel.expert_mlp(*inputs, gelu=gelu, interpret=True)
    return got, expert_mlp_reference(*inputs, gelu)

  assert 'this is cpu' in str(kernel.unsupported_reason(*inputs))
  got, expected = both(*inputs)
  np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_no_expert_adds_nothing():
  x, weights, experts, matrices = make_inputs(1, 2, has_gate=False)
  run = jax.jit(lambda *args: kernel.expert_mlp(*args, interpret=True))
  nothing = run(x, weights, jnp.full_like(experts, X), matrices)
  assert not np.any(np.asarray(nothing))


@pytest.fixture
def on_gpu(monkeypatch):
  """As if this were one, on which all kernels compile."""
  monkeypatch.setattr(mesh, 'platform', lambda: 'gpu')
  monkeypatch.setattr(probe, 'first_error', lambda *args: None)
  probe._compilation_error.cache_clear()
  yield
  probe._compilation_error.cache_clear()


def test_what_it_does_not_serve(on_gpu):
  inputs = make_inputs(3, 2, has_gate=False)
  x, weights, experts, matrices = inputs

  def why(x=x, weights=weights, experts=experts, **others):
    parts = weights, experts, matrices | others
    return str(kernel.unsupported_reason(x, *parts))

  assert why() == 'None'
  many, _, of_many, _ = make_inputs(60, 2, has_gate=False)
  few = jnp.zeros((60, 2))
  assert '120 assignments are not 1 to 80' in why(many, few, of_many)
  assert 'float8' in why(x.astype(jnp.float8_e4m3fn))
  assert 'multiples of 16' in why(up=jnp.zeros((X, D, 40)))
  codes = QuantizedMatrix(jnp.zeros((X, D, F), 'int8'), jnp.ones((1,)), 'int8')
  assert 'quantized' in why(up=codes)


def test_a_mixture_takes_it_where_it_runs(on_gpu):
  """A GPU's branch is traced, and not compiled here."""
  inputs = make_inputs(3, 2, has_gate=False)
  assert 'name=few_experts' in str(jax.make_jaxpr(expert_mlp)(*inputs))
  some = jnp.zeros((), jnp.int32)
  split = functools.partial(expert_mlp, first_expert=some)
  assert 'name=few_experts' not in str(jax.make_jaxpr(split)(*inputs))


def test_a_gradient_goes_by_steps(on_gpu):
  x, weights, experts, matrices = make_inputs(3, 2, has_gate=False)

  def loss(x, weights, matrices):
    return expert_mlp(x, weights, experts, matrices).sum()

  gradient = jax.grad(loss, (0, 1, 2))
  jaxpr, shapes = jax.make_jaxpr(gradient, return_shape=True)(
    x, weights, matrices
  )
  assert 'name=few_experts' not in str(jaxpr)
  assert shapes[2]['up'].shape == (X, D, F)
