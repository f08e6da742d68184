# SPDX-License-Identifier: Apache-2.0
"""Texts that see a picture, in slots beside texts that see none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seeing_run
from lanes import few

from jaxsparse.inference import sight
from jaxsparse.inference.jobs import JobSampling
from jaxsparse.inference.slot_programs import Programs

CONFIGS = dict(
  prefix=seeing_run.config(),
  co_attention=seeing_run.config('co_attention', num_fusion_layers=3),
)
C, NUM_SLOTS, NUM_DRAWN = 4, 3, 4
# Of a slot: the longest text, whose last token is never fed.
MOST = 12


def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(1, 256, n).tolist() for n in (9, 1, 5)]


@functools.cache
def programs(name):
  config = CONFIGS[name]
  params = jax.tree.map(jnp.asarray, seeing_run.params_of(config))
  params, found = sight.split(config.multimodal, config.model, params)
  return Programs.compile(
    config.model, params, NUM_SLOTS, MOST, chunks=(C,), is_lazy=True,
    sight=found,
  )  # fmt: skip


def served(run, order, pictures):
  """Tokens of each prompt, one begun after the other in slots of any number."""
  found = {i: [] for i in order}
  slot_of = {}
  for slot, i in enumerate(order):
    run.start(slot, JobSampling(temperature=0.0))
    slot_of[i] = slot
    if pictures[i] is not None:
      run.see(slot, pictures[i])
    prompt = prompts()[i]
    for begin in range(0, len(prompt), C):
      is_last = begin + C >= len(prompt)
      pending = run.prefill(slot, prompt[begin : begin + C], is_last)
    found[i].append(int(pending.result().tokens[slot]))
    live = [j for j in slot_of if len(found[j]) < NUM_DRAWN]
    draw(run, found, slot_of, live)
  while live := [j for j in slot_of if len(found[j]) < NUM_DRAWN]:
    draw(run, found, slot_of, live)
  return found


def draw(run, found, slot_of, live):
  is_live = np.isin(np.arange(NUM_SLOTS), [slot_of[j] for j in live])
  tokens = run.decode(is_live).result().tokens
  for j in live:
    found[j].append(int(tokens[slot_of[j]]))


@pytest.mark.parametrize('name', few(['prefix'], CONFIGS))
def test_each_text_has_its_own_picture(name):
  """Whatever the neighbours have, and whatever the slot has had before."""
  config, run = CONFIGS[name], programs(name)
  one, two = seeing_run.pictures(2)
  pictures = [one, two, None]
  want = {
    i: seeing_run.caption(config, pictures[i], prompts()[i], NUM_DRAWN)
    for i in range(3)
  }
  for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
    assert served(run, order, pictures) == want
  for other in (two, None):
    assert want[0] != seeing_run.caption(config, other, prompts()[0], NUM_DRAWN)


def test_a_text_behind_a_picture_is_as_long_as_one_without():
  """The last chunk begins at row 17."""
  run = programs('prefix')
  run.start(0, JobSampling(temperature=0.0))
  run.see(0, seeing_run.pictures(1)[0])
  for begin in (0, 4, 8):
    run.prefill(0, [1] * 4, is_last=begin == 8)
  assert run.lengths()[0] == 21
