# SPDX-License-Identifier: Apache-2.0
"""Any leading dimensions, no token at all, and integers, at every layer."""

import dataclasses
import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import few
from parameters import draw, place

from jaxsparse import mesh as mesh_lib
from jaxsparse.config import MemoryConfig, ModelConfig
from jaxsparse.config.attention import DCMHAConfig, SparseAttentionConfig
from jaxsparse.config.errors import UserError
from jaxsparse.config.model import MoEConfig
from jaxsparse.nn.attention.dcmha import DCMHA
from jaxsparse.nn.attention.layer import Attention
from jaxsparse.nn.attention.sparse import SparseAttention
from jaxsparse.nn.block import Block
from jaxsparse.nn.experts import MoE
from jaxsparse.nn.layers import (
  MLP,
  Embed,
  LayerNorm,
  RMSNorm,
  dropout,
  project_to_vocabulary,
)
from jaxsparse.nn.leading import Leading
from jaxsparse.nn.memory.layer import MemoryLayer
from jaxsparse.nn.transformer import Transformer, init_cache

KEY = jax.random.key(0)
# [B, G, T, D] is the largest of the inputs; N heads of width H.
B, G, T, D, N, H, V = 2, 2, 4, 8, 2, 4, 16

MODEL = ModelConfig(
  num_layers=1, model_dim=D, num_heads=N, num_kv_heads=N, head_dim=H,
  mlp_dim=16, vocab_size=V,
)  # fmt: skip
MEMORY = MemoryConfig(num_keys=4, key_dim=4, num_selected=2, value_dim=4)
MOE = MoEConfig(
  num_experts=4, num_experts_per_token=2, expert_dim=6, num_shared=1
)
SPARSE = SparseAttentionConfig(block=2, tile=2, window_blocks=1, max_blocks=2)


def model(**fields):
  return dataclasses.replace(MODEL, **fields)


class Project(nn.Module):
  @nn.compact
  def __call__(self, x):
    table = self.param('table', nn.initializers.ones, (V, D))
    return project_to_vocabulary(x, table)


class Drop(nn.Module):
  @nn.compact
  def __call__(self, x):
    return dropout(x, 0.5, KEY)


class Case(NamedTuple):
  """A layer, and what it takes besides its first argument."""

  layer: nn.Module
  # 'x' of width D, or 'tokens'.
  kind: str = 'x'
  # Names of what follows: positions, segment_ids, or heads.
  more: tuple[str, ...] = ()


ATTENTION = ('positions', 'segment_ids')
HEADS = ('heads', 'heads', 'heads', 'segment_ids')
CASES = dict(
  memory=Case(MemoryLayer(MEMORY), more=('segment_ids',)),
  memory_of_pre_values=Case(
    MemoryLayer(
      MemoryConfig.ultramem_v2(
        num_keys=4, num_selected=2, value_dim=8, pre_value_dim=8
      )
    )
  ),
  moe=Case(MoE(MOE, 'gelu'), more=('segment_ids',)),
  mlp=Case(MLP(16)),
  gelu=Case(MLP(16, 'gelu', use_bias=True)),
  rms=Case(RMSNorm()),
  layer_norm=Case(LayerNorm()),
  dcmha=Case(DCMHA(DCMHAConfig(base=True), N)),
  attention=Case(Attention(MODEL), more=ATTENTION),
  local=Case(
    Attention(model(attention_pattern=('local',), window=2)), more=ATTENTION
  ),
  composed=Case(Attention(model(dcmha=DCMHAConfig())), more=ATTENTION),
  sparse=Case(
    Attention(model(attention_pattern=('sparse',), sparse=SPARSE)),
    more=ATTENTION,
  ),
  sparse_part=Case(
    SparseAttention(model(attention_pattern=('sparse',), sparse=SPARSE)),
    more=HEADS,
  ),
  block=Case(Block(model(moe=MOE), 0), more=ATTENTION),
  embed=Case(Embed(V, D), 'tokens'),
  project=Case(Project()),
  drop=Case(Drop()),
  transformer=Case(
    Transformer(
      model(
        memory=dataclasses.replace(
          MEMORY, query_conv_taps=2, placements=((0, 0),)
        ),
      )
    ),
    'tokens',
    ATTENTION,
  ),
)  # fmt: skip

# Those that are made of others are slow: a whole model reads through a cache
# below.
FEW = CASES.keys() - {
  'memory_of_pre_values', 'sparse', 'block', 'composed', 'transformer',
}  # fmt: skip


def inputs_of(case, lead):
  """Inputs [*lead, ...] of a case, the same numbers for every `lead`."""
  rng = np.random.default_rng(0)
  size = int(np.prod(lead))

  def draw(*width):
    numbers = rng.normal(size=(B * G * T, *width))[:size]
    return numbers.reshape(*lead, *width).astype(np.float32)

  tokens = np.asarray(np.arange(size).reshape(lead) * 7 % V, np.int32)
  arrays = dict(
    x=lambda: draw(D),
    tokens=lambda: tokens,
    heads=lambda: draw(N, H),
    positions=lambda: np.broadcast_to(
      np.arange(lead[-1] if lead else 1, dtype=np.int32), lead or (1,)
    ).reshape(lead),
    segment_ids=lambda: np.ones(lead, np.int32),
  )
  return tuple(arrays[name]() for name in (case.kind, *case.more))


def of_tokens(result):
  """What of a layer's result is of tokens, and its metrics."""
  outputs, metrics = [], {}
  for part in result if isinstance(result, tuple) else (result,):
    if not isinstance(part, dict):
      outputs += [] if part is None else [part]
    elif all(isinstance(key, tuple) for key in part):  # Streams of DCMHA.
      outputs += [part[key] for key in sorted(part)]
    else:  # Or its bases, which have no tokens.
      metrics |= {name: x for name, x in part.items() if x.ndim == 0}
  return outputs, metrics


def check(actual, expected):
  jax.tree.map(
    lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-5),
    actual,
    expected,
  )


@pytest.mark.parametrize('name', few(FEW, CASES))
def test_any_leading_dimensions(name):
  """[B, G, T, D] is [B * G, T, D], and each [T, D] a row of it by `vmap`."""
  layer, inputs = CASES[name].layer, inputs_of(CASES[name], (B, G, T))
  flat = tuple(x.reshape(-1, *x.shape[2:]) for x in inputs)

  @jax.jit
  def run(params, inputs, flat):
    return (
      of_tokens(layer.apply(params, *inputs)),
      of_tokens(layer.apply(params, *flat)),
      jax.vmap(lambda *one: of_tokens(layer.apply(params, *one))[0])(*flat),
    )

  params = draw(layer.init, *flat)
  (outputs, metrics), expected, rows = jax.device_get(run(params, inputs, flat))
  assert outputs
  assert all(y.shape[:3] == (B, G, T) for y in outputs)
  check(([y.reshape(B * G, *y.shape[2:]) for y in outputs], metrics), expected)
  if name != 'drop':  # Its mask is one of the whole array.
    check(rows, expected[0])


def shapes(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


@pytest.mark.parametrize('name', few(FEW - {'sparse_part', 'local'}, CASES))
def test_one_token_and_none(name):
  """The same parameters and types; with no token, metrics are 0."""
  case = CASES[name]

  def init(*inputs):
    result, params = case.layer.init_with_output(KEY, *inputs)
    return of_tokens(result), params

  (full, _), params = shapes(jax.eval_shape(init, *inputs_of(case, (B, T))))
  for lead in ((), (T,), (0,), (0, T), (B, 0, T)):
    (outputs, _), declared = jax.eval_shape(init, *inputs_of(case, lead))
    assert shapes(declared) == params
    assert shapes(outputs) == [
      ((*lead, *shape[2:]), dtype) for shape, dtype in full
    ]
  nothing = inputs_of(case, (0, T))
  params = draw(case.layer.init, *nothing)
  apply = jax.jit(lambda *args: of_tokens(case.layer.apply(*args)))
  _, metrics = apply(params, *nothing)
  assert all(value == 0 for value in metrics.values())


@pytest.mark.parametrize('name', CASES)
def test_numbers_of_another_kind_are_refused_in_a_sentence(name):
  case = CASES[name]
  first, *rest = inputs_of(case, (B, T))
  if case.kind == 'tokens':
    wrong, sentence = (
      (jnp.float32, jnp.bfloat16),
      'tokens must be integers, got {}.',
    )
  else:
    wrong, sentence = (
      (jnp.int32, jnp.uint8),
      'x must be of a floating-point type, got {}.',
    )
  for dtype in map(jnp.dtype, wrong):
    with pytest.raises(UserError) as error:
      jax.eval_shape(
        functools.partial(case.layer.init, KEY), first.astype(dtype), *rest
      )
    assert str(error.value) == sentence.format(dtype.name)


def test_a_cache_serves_any_leading_dimensions():
  """Token by token, as [B, G, 1] and at last as [B, G, 0], from one cache."""
  case = CASES['transformer']
  inputs = inputs_of(case, (B, G, T))
  params = draw(case.layer.init, *inputs)
  apply = jax.jit(case.layer.apply)
  whole = np.asarray(apply(params, *inputs)[0])
  cache = jax.jit(functools.partial(init_cache, case.layer.config, B * G, T))()
  for t in range(T):
    logits, cache, _ = apply(params, *(x[..., t, None] for x in inputs), cache)
    check(logits, whole[:, :, t, None])
  logits, same, _ = apply(params, *(x[..., :0] for x in inputs), cache)
  assert logits.shape == (B, G, 0, V)
  check(same, cache)


def test_a_context_has_the_leading_dimensions_too():
  config = dataclasses.replace(MEMORY, query_conv_taps=3)
  layer = MemoryLayer(config)
  x, segment_ids = inputs_of(CASES['memory'], (B, G, T))
  params = draw(layer.init, x, segment_ids)
  apply = jax.jit(layer.apply)
  whole = np.asarray(apply(params, x, segment_ids)[0])
  context = x[..., :2, :], segment_ids[..., :2]
  rest, _ = apply(params, x[..., 2:, :], segment_ids[..., 2:], context)
  check(rest, whole[..., 2:, :])
  one = x[0, 0, 2], segment_ids[0, 0, 2], tuple(c[0, 0] for c in context)
  check(apply(params, *one)[0], whole[0, 0, 2])


@pytest.mark.parametrize(
  'name',
  # Memory has inputs of any rank on a guest's mesh.
  few(['mlp', 'attention'], ['memory', 'moe', 'mlp', 'attention']),
)
def test_on_a_mesh(name):
  """[B, G, T, D] keeps its sharding; one sequence all devices compute."""
  case = CASES[name]
  inputs = inputs_of(case, (B, G, T))
  params = draw(case.layer.init, *inputs)
  expected, _ = of_tokens(jax.jit(case.layer.apply)(params, *inputs))
  mesh = mesh_lib.make_mesh(2, 1, 2, devices=jax.devices()[:4])
  with jax.set_mesh(mesh):

    def on_mesh(x):
      return mesh_lib.reshard(x, mesh_lib.act('B' + '.' * (x.ndim - 1)))

    def init(key, *inputs):
      return case.layer.init(key, *map(on_mesh, inputs))

    apply = jax.jit(
      lambda params, *inputs: case.layer.apply(params, *map(on_mesh, inputs))
    )
    placed = place(params, init, *inputs)
    actual, _ = of_tokens(apply(placed, *inputs))
    check(actual, expected)
    assert actual[0].sharding.spec[0] == mesh_lib.TOKENS
    one, _ = jax.eval_shape(
      functools.partial(case.layer.init_with_output, KEY),
      *(x[0, 0] for x in inputs),
    )
    assert of_tokens(one)[0][0].shape == inputs[0][0, 0].shape


def test_other_arguments_must_have_the_same_leading_dimensions():
  lead = Leading((B, T))
  assert lead.flat(x := jnp.ones((B, T, D))) is x
  assert lead.restored(x) is x
  for shape in ((B,), (T, B), (B, T + 1)):
    with pytest.raises(UserError, match=r'segment_ids must have .*\[2, 4\]'):
      lead.flat(jnp.ones(shape, jnp.int32), 'segment_ids')
  with pytest.raises(UserError, match='a last dimension, got a scalar'):
    Leading.of(jnp.float32(1))
