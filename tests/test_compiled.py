# SPDX-License-Identifier: Apache-2.0
"""The reader of compiled programs, on lines as each backend writes them."""

import jax
import jax.numpy as jnp
from compiled import Collective, Payload, arrays_of_size, collectives, payloads

from jaxsparse import mesh as mesh_lib

GPU = """
%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

ENTRY %main (a: f32[64,4], b: s32[64,4]) -> f32[8] {
  %all-gather-start = ((f32[64,4]{1,0}, s32[64,4]{1,0}), (f32[256,4]{1,0}, s32[256,4]{1,0})) all-gather-start(%a, %b), dimensions={0}
  %all-gather-done = (f32[256,4]{1,0}, s32[256,4]{1,0}) all-gather-done(%all-gather-start)
  %reduce-scatter-start = ((f32[256,8]{1,0}), f32[64,8]{1,0}) reduce-scatter-start(%x), to_apply=%add
  %all-reduce-start = (f32[], f32[3]{0}) all-reduce-start(%y, %z), to_apply=%add
  ROOT %all_to_all = f32[4,2]{1,0} all-to-all(%all-reduce-done), dimensions={0}
}
"""  # noqa: E501

TPU = """
%async_collective_fusion (a: f32[2,8]) -> f32[16,8] {
  ROOT %all-gather.1 = f32[16,8]{1,0:T(8,128)} all-gather(%a), frontend_attributes={chain_id="0"}
}

%async_collective_fusion.1 (a: f32[2,8]) -> f32[16,8] {
  ROOT %all-gather.2 = f32[16,8]{1,0:T(8,128)} all-gather(%a), frontend_attributes={chain_id="0"}
}

%all-reduce-scatter (input: f32[256,8]) -> f32[64,8] {
  %all-reduce.1 = f32[256,8]{1,0:T(8,128)} all-reduce(%input), to_apply=%add
  ROOT %slice = f32[64,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %i, %j)
}

ENTRY %main (a: f32[256,8]) -> f32[64,8] {
  %collective-permute-start = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%b)
  %table = bf16[128,64]{1,0:T(8,128)(2,1)} copy(%c)
  ROOT %fusion = f32[64,8]{1,0:T(8,128)S(1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
}
"""  # noqa: E501

CPU = """
ENTRY %main (a: f32[8,2]) -> f32[8,2] {
  ROOT %all-to-all = (f32[4,2]{1,0}, f32[4,2]{1,0}) all-to-all(%a, %b)
}
"""


def test_instructions_of_every_backend():
  assert collectives(GPU) == [
    Collective('all-gather', ('f32[256,4]', 's32[256,4]')),
    Collective('all-reduce', ('f32[]', 'f32[3]')),
    Collective('all-to-all', ('f32[4,2]',)),
    Collective('reduce-scatter', ('f32[64,8]',)),
  ]
  assert collectives(TPU) == [
    Collective('all-gather', ('f32[16,8]',)),
    Collective('collective-permute', ('f32[8]',)),
    Collective('reduce-scatter', ('f32[64,8]',)),
  ]


def test_payloads_are_the_same_whatever_shares_an_instruction():
  assert payloads(GPU)[:2] == [
    Payload('all-gather', 'f32', 1024),
    Payload('all-gather', 's32', 1024),
  ]
  assert payloads(CPU) == [Payload('all-to-all', 'f32', 16)]


def test_arrays_of_size():
  assert arrays_of_size(TPU, 'copy', 128 * 64) == ['bf16[128,64]']
  assert arrays_of_size(TPU, 'copy', 128 * 64 + 1) == []


def test_a_program_compiled_here():
  @jax.jit
  def program(x):
    def on_device(x):
      whole = jax.lax.all_gather(x, 'sparse', tiled=True)
      return jax.lax.psum_scatter(whole, 'sparse', tiled=True)

    return jax.shard_map(on_device, out_specs=jax.P('sparse'))(x)

  with jax.set_mesh(mesh_lib.make_mesh(1, 8, 1)):
    x = jnp.zeros((16, 4), out_sharding=jax.P('sparse'))
    text = program.lower(x).compile().as_text()
  assert collectives(text) == [
    Collective('all-gather', ('f32[16,4]',)),
    Collective('reduce-scatter', ('f32[2,4]',)),
  ]
