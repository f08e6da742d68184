# SPDX-License-Identifier: Apache-2.0
"""Texts with a picture before them, in slots beside texts without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import seeing_run
from seeing_run import LENGTH

from jaxsparse.inference.fold import fold_for_decode
from jaxsparse.inference.jobs import JobSampling
from jaxsparse.inference.picture_prefix import PicturePrefix
from jaxsparse.inference.slot_programs import Programs
from jaxsparse.nn.transformer import Transformer

CONFIG, C, NUM_SLOTS, NUM_DRAWN = seeing_run.config(), 4, 3, 4
# Of a slot: the longest text, whose last token is never fed.
MOST = 12


def prompts():
  rng = np.random.default_rng(0)
  return [rng.integers(1, 256, n).tolist() for n in (9, 1, 5)]


@functools.cache
def programs():
  params = jax.tree.map(jnp.asarray, seeing_run.params_of(CONFIG))
  text = fold_for_decode(CONFIG.model, params.pop('text'))
  return Programs.compile(
    CONFIG.model, text, NUM_SLOTS, MOST, chunks=(C,), is_lazy=True,
    pictures=PicturePrefix(CONFIG.multimodal, params),
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


def without_picture(prompt):
  """What the language model alone goes on with."""
  params = {'params': seeing_run.params_of(CONFIG)['text']}
  apply = jax.jit(Transformer(CONFIG.model).apply)
  text = list(prompt)
  for _ in range(NUM_DRAWN):
    tokens = np.array([[*text, *[0] * (LENGTH - len(text))]], np.int32)
    text.append(int(apply(params, tokens)[0][0, len(text) - 1].argmax()))
  return text[len(prompt) :]


def test_each_text_has_its_own_picture():
  """Whatever the neighbours have, and whatever the slot has had before."""
  one, two = seeing_run.pictures(2)
  pictures = [one, two, None]
  want = {
    i: seeing_run.caption(CONFIG, pictures[i], prompts()[i], NUM_DRAWN)
    for i in range(2)
  } | {2: without_picture(prompts()[2])}
  run = programs()
  for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
    assert served(run, order, pictures) == want
  other = seeing_run.caption(CONFIG, two, prompts()[0], NUM_DRAWN)
  assert other != want[0]


def test_a_text_behind_a_picture_is_as_long_as_one_without():
  """The last chunk begins at row 17."""
  run = programs()
  run.start(0, JobSampling(temperature=0.0))
  run.see(0, seeing_run.pictures(1)[0])
  for begin in (0, 4, 8):
    run.prefill(0, [1] * 4, is_last=begin == 8)
  assert run.lengths()[0] == 21
