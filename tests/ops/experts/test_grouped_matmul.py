# SPDX-License-Identifier: Apache-2.0
"""Products with experts equal their references and read only what they need."""

import argparse
import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import arrays_of_size
from lanes import few

from jaxsparse import mesh
from jaxsparse.config.errors import UserError
from jaxsparse.experiments.bench import grouped_matmul as bench
from jaxsparse.ops.experts import expert_mlp as mlp
from jaxsparse.ops.experts import grouped_matmul as ops
from jaxsparse.ops.experts import grouped_matmul_libraries as libraries
from jaxsparse.ops.kernels import grouped_matmul as kernels

S, X, D, F = 53, 5, 12, 24

# Rows of each expert: ones that a CPU takes in every way, none, and all.
SIZES = {
  'uneven': [1, 0, 30, 3, 2],
  'all on the first': [S, 0, 0, 0, 0],
  'all on the last': [0, 0, 0, 0, S],
  'even': [10, 10, 11, 11, 11],
  'none': [0] * X,
}


def draw(*shape, seed=0, dtype=jnp.float32):
  x = np.random.default_rng(seed).normal(size=shape).astype(dtype)
  # Unlike `jnp.asarray`, without a program for each shape.
  return jax.device_put(x)


def integers(values):
  return jax.device_put(np.array(values, np.int32))


@functools.partial(jax.jit, static_argnums=0)
def run(product, rows, experts, which, cotangent):
  """The products and the gradients of rows and experts."""
  out, vjp = jax.vjp(lambda r, e: product(r, e, which), rows, experts)
  return out, *vjp(cotangent)


def check(actual, expected, rtol=1e-5):
  for a, e in zip(actual, expected, strict=True):
    assert a.dtype == e.dtype
    a, e = (np.asarray(x, np.float64) for x in (a, e))
    np.testing.assert_allclose(
      a, e, rtol=0, atol=rtol * max(1, np.abs(e).max(initial=0))
    )


@pytest.mark.parametrize('sizes', SIZES)
def test_grouped_equals_its_reference(sizes):
  args = draw(S, D), draw(X, D, F, seed=1), integers(SIZES[sizes])
  cotangent = draw(S, F, seed=2)
  actual = run(ops.grouped_matmul, *args, cotangent)
  check(actual, run(ops.grouped_matmul_reference, *args, cotangent))
  for i, size in enumerate(SIZES[sizes]):
    assert size or not np.any(np.asarray(actual[2])[i])


@pytest.mark.parametrize('num_rows', few([0, 300], [0, 1, 300]))
def test_any_number_of_rows(num_rows):
  experts = np.random.default_rng(0).integers(X, size=num_rows)
  sizes = integers(np.bincount(experts, minlength=X))
  args = draw(num_rows, D), draw(X, D, F, seed=1), sizes
  cotangent = draw(num_rows, F, seed=2)
  actual = run(ops.grouped_matmul, *args, cotangent)
  expected = run(ops.grouped_matmul_reference, *args, cotangent)
  check(actual, expected, 1e-4 if num_rows > S else 1e-5)


def test_rows_of_nobody_may_hold_anything():
  rows, cotangent = np.array(draw(S, D)), np.array(draw(S, F, seed=2))
  rows[36:], cotangent[36:] = np.nan, np.nan
  experts, sizes = draw(X, D, F, seed=1), integers(SIZES['uneven'])
  out, d_rows, d_experts = map(
    np.asarray, run(ops.grouped_matmul, rows, experts, sizes, cotangent)
  )
  assert not np.any(out[36:])
  assert not np.any(d_rows[36:])
  assert np.isfinite(out).all()
  assert np.isfinite(d_experts).all()


@pytest.mark.parametrize('function', ['grouped_matmul', 'assigned_matmul'])
def test_f64(function):
  with jax.enable_x64(True):
    rows, experts = draw(9, D, dtype=float), draw(X, D, F, seed=1, dtype=float)
    cotangent = draw(9, F, seed=2, dtype=float)
    which = dict(
      grouped_matmul=integers([1, 0, 4, 2, 2]),
      assigned_matmul=integers([4, 4, 0, 1, 2, 2, 2, 0, 1]),
    )[function]
    actual = run(getattr(ops, function), rows, experts, which, cotangent)
    reference = getattr(ops, f'{function}_reference')
    check(actual, run(reference, rows, experts, which, cotangent), 1e-13)


def test_assigned_equals_its_reference():
  expert = integers([3, 0, 3, 4])
  args = draw(4, D), draw(X, D, F, seed=1), expert, draw(4, F, seed=2)
  actual = run(ops.assigned_matmul, *args)
  check(actual, run(ops.assigned_matmul_reference, *args))


def test_experts_are_stored_in_f32_and_multiplied_in_bf16():
  rows = draw(S, D, dtype=jnp.bfloat16)
  cotangent = draw(S, F, seed=2, dtype=jnp.bfloat16)
  experts, sizes = draw(X, D, F, seed=1), integers(SIZES['uneven'])
  actual = run(ops.grouped_matmul, rows, experts, sizes, cotangent)
  rounded = np.asarray(experts).astype(jnp.bfloat16)
  rows, rounded, cotangent = (
    np.asarray(x).astype(np.float32) for x in (rows, rounded, cotangent)
  )
  expected = run(ops.grouped_matmul_reference, rows, rounded, sizes, cotangent)
  assert [x.dtype for x in actual] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
  actual = [np.asarray(x).astype(np.float32) for x in actual]
  check(actual[:2], expected[:2], 1e-2)
  check(actual[2:], expected[2:], 1e-5)


# The same objects for all tests, so that each is compiled once for a shape.
RAGGED = functools.partial(ops.grouped_matmul, implementation='ragged_dot')
MEGABLOX, TRITON = (
  functools.partial(kernel, interpret=True)
  for kernel in (libraries.megablox, libraries.triton)
)


@pytest.mark.parametrize('sizes', ['uneven', 'none'])
def test_other_implementations_compute_the_same(sizes):
  args = draw(S, D), draw(X, D, F, seed=1), integers(SIZES[sizes])
  cotangent = draw(S, F, seed=2)
  expected = run(ops.grouped_matmul_reference, *args, cotangent)
  for other in (RAGGED, MEGABLOX, TRITON):
    check(run(other, *args, cotangent), expected)


def test_a_kernel_for_gpus_has_many_tiles():
  """Several of each expert, and widths that they do not divide."""
  sizes = integers([0, 150, 100, 20])
  args = draw(300, 200), draw(4, 200, 130, seed=1), sizes
  cotangent = draw(300, 130, seed=2)
  expected = run(ops.grouped_matmul_reference, *args, cotangent)
  check(run(TRITON, *args, cotangent), expected)


def test_a_kernel_for_gpus_takes_rows_as_assigned():
  args = draw(4, 70), draw(X, 70, 130, seed=1), integers([3, 0, 3, 4])

  @jax.jit
  def both(*args):
    y = kernels.assigned_matmul(*args, interpret=True)
    return y, ops.assigned_matmul_reference(*args)

  y, expected = both(*args)
  check([y], [expected])


def test_what_a_kernel_for_gpus_does_not_serve():
  rows, experts = draw(4, D), draw(X, D, F)
  assert kernels.unsupported_reason(rows, experts) is None
  assert 'nothing' in kernels.unsupported_reason(draw(0, D), experts)
  shapes = [(rows.shape, 'float64'), ((2**11, 2**10, 2**10), 'float32')]
  wide, large = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
  assert 'not float64' in kernels.unsupported_reason(wide, experts)
  assert 'not below 2^31' in kernels.unsupported_reason(rows, large)


def test_what_cannot_run_is_told_in_a_sentence():
  args = draw(S, D), draw(X, D, F), integers(SIZES['even'])
  for name in ('megablox', 'triton'):
    with pytest.raises(UserError, match=f"'{name}' can't run here: it is for"):
      ops.grouped_matmul(*args, implementation=name)
  with pytest.raises(UserError, match="'fast' must be one of 'auto', 'loop'"):
    ops.grouped_matmul(*args, implementation='fast')


def test_tpus_take_ragged_dot_where_their_kernel_cannot_run(monkeypatch):
  args = draw(S, D), draw(X, D, F), integers(SIZES['even'])
  monkeypatch.setattr(mesh, 'platform', lambda: 'tpu')
  monkeypatch.setattr(libraries, 'unsupported_reason', lambda *args: 'a mesh')
  assert 'ragged_dot' in str(jax.make_jaxpr(ops.grouped_matmul)(*args))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_no_temporary_holds_all_experts(dtype):
  args = draw(16, D, dtype=dtype), draw(64, D, F), integers([0] * 64)
  program = jax.jit(ops.grouped_matmul).lower(*args).compile()
  assert program.memory_analysis().temp_size_in_bytes < 64 * D * F
  text = program.as_text()
  for op in ('copy', 'convert', 'gather', 'dynamic-slice'):
    assert not arrays_of_size(text, op, 2 * D * F)


@pytest.mark.parametrize(
  ('num_tokens', 'kind'),
  few([(2, 'erf'), (20, 'swiglu')], [(2, 'erf'), (20, 'tanh'), (20, 'swiglu')]),
)
def test_mlp_of_experts_equals_its_reference(num_tokens, kind):
  """With 2 tokens on 8 experts, in the form for a few tokens and sorted."""
  k, num_experts = 3, 8
  rng = np.random.default_rng(0)
  experts = integers(
    rng.permuted(np.tile(np.arange(8), (num_tokens, 1)), axis=1)[:, :k]
  )
  x, weights = draw(num_tokens, D), draw(num_tokens, k, seed=1)
  matrices = dict(
    up=draw(num_experts, D, F, seed=2), down=draw(num_experts, F, D, seed=3)
  )
  if kind == 'swiglu':
    matrices['gate'] = draw(num_experts, D, F, seed=4)
  cotangent = draw(num_tokens, D, seed=5)

  def run(function, **keywords):
    @jax.jit
    def both(*args):
      out, vjp = jax.vjp(
        lambda x, w, m: function(x, w, experts, m, **keywords), *args
      )
      return out, vjp(cotangent)

    return jax.tree.leaves(both(x, weights, matrices))

  form = {} if kind == 'swiglu' else dict(gelu=kind)
  expected = run(mlp.expert_mlp_reference, **form)
  check(run(mlp.expert_mlp, **form), expected)
  if num_tokens == 2:
    check(run(mlp.expert_mlp, implementation='loop', **form), expected)


def test_contenders_of_the_bench_compute_the_same():
  options = argparse.Namespace(
    experts=5, depth=8, width=6, rows=9, used=2, dtype='float32'
  )
  dense, *others = bench.token_contenders(options).values()
  for _ in range(options.experts):
    expected = dense.run()
    for contender in others:
      # Both in ascending order of experts.
      check([contender.run()], [expected])
  for contender in bench.hit_contenders(options, [1, 4]).values():
    assert contender.run().shape == (9, 6)


@pytest.mark.slow
def test_time_follows_the_distinct_experts(tmp_path):
  """In a process of its own, compiled as for users."""
  path = tmp_path / 'report.json'
  subprocess.run(
    [
      *(sys.executable, '-m', 'jaxsparse', 'bench'),
      *('grouped_matmul', '--json', path),
    ],
    env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},
    check=True,
  )
  results = json.loads(path.read_text())['results']
  assert max(r['to_line'] for r in results if 'to_line' in r) < 1.5
  token = {r['contender']: r['seconds'] for r in results if 'to_line' not in r}
  assert token['assigned_matmul'] < 1.2 * token['dense products']


def test_a_steady_product_hangs_on_its_own_row_alone():
  """Its bits do, whether its expert has one row or many."""
  rows, experts = draw(24, 256), draw(3, 256, 512, seed=1)
  steady = jax.jit(functools.partial(ops.grouped_matmul, is_steady=True))
  found = [
    steady(rows, experts, integers(sizes))
    for sizes in ([24, 0, 0], [1, 23, 0], [6, 2, 16], [1, 0, 0])
  ]
  expected = ops.grouped_matmul_reference(rows, experts, integers([24, 0, 0]))
  np.testing.assert_allclose(found[0], expected, atol=1e-4)
  for other in found[1:]:
    np.testing.assert_array_equal(other[0], found[0][0])
  assert not found[3][1:].any()


def test_no_expert_is_read_for_rows_that_have_none():
  rows, experts = draw(4, D), draw(X, D, F, seed=1)
  # What is read would show.
  experts = experts.at[X - 1].set(np.nan)
  found = jax.jit(ops.assigned_matmul)(rows, experts, integers([1, X, 2, X]))
  expected = ops.assigned_matmul_reference(
    rows, experts, integers([1, 0, 2, 0])
  )
  np.testing.assert_allclose(found[::2], expected[::2], atol=1e-5)
  assert not found[1::2].any()
