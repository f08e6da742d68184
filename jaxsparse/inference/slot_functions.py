# SPDX-License-Identifier: Apache-2.0
"""What programs of slots compute: functions of the state of all slots.

The state has the caches of all slots, how each draws, and its last token, which
is fed next. `slots.take` and `slots.put` are what a function of one slot begins
and ends with.

Letters: B slots, C tokens of a chunk, V tokens, W = V / 32 words of a mask.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxsparse import mesh
from jaxsparse.config import ModelConfig
from jaxsparse.inference import (
  row_cache,
  served_adapters,
  slot_sampling,
  slots,
)
from jaxsparse.inference.slot_model import SlotModel

State = dict[str, Any]
# That were read, see `row_cache.reads`.
Rows = dict[str, jax.Array]


def init(model: SlotModel, num_slots: int, num_rows: int) -> State:
  """The state of slots that nobody has."""
  sampling = slot_sampling.init(num_slots, model.config.vocab_size)
  return dict(
    cache=model.init_cache(num_slots, num_rows),
    sampling=jax.tree.map(_whole, sampling),
    # Of each slot the last token, which is fed next.
    token=_whole(jnp.zeros(num_slots, jnp.int32)),
    # Of each slot which of several adapters it has, see `served_adapters`.
    place=_whole(jnp.zeros(num_slots, jnp.int32)),
  )


def _whole(x):
  """`x` alike on every device."""
  return mesh.reshard(x, mesh.act('.' * x.ndim))


def _scores(logits):
  """Logits alike on every device, and in every program that makes them."""
  return jax.lax.optimization_barrier(_whole(logits))


def _like(new, old):
  """The state laid as the programs take it."""
  if mesh.axis_sizes() is None:
    return new
  return jax.tree.map(
    lambda x, y: mesh.reshard(x, jax.typeof(y).sharding.spec), new, old
  )


def start(
  state: State,
  slot: jax.Array,
  fields: dict[str, jax.Array],
  place: jax.Array,
) -> State:
  """One slot with a new tenant's `slot_sampling.of_job`, and nothing read."""
  part = slots.take(state, slot)
  part = dict(
    cache=slots.emptied(part['cache']),
    sampling=slot_sampling.taken_over(part['sampling'], fields),
    token=jnp.zeros_like(part['token']),
    place=jnp.full_like(part['place'], place),
  )
  return _like(slots.put(state, part, slot), state)


def decode(
  state: State,
  params: dict,
  is_live: jax.Array,
  mask: jax.Array | None = None,
  *,
  model: SlotModel,
  stop_ids: tuple[int, ...],
  form: str,
) -> tuple[State, jax.Array, slot_sampling.Best | None, Rows]:
  """Feeds the live slots [B] their last tokens and draws the next ones [B]."""
  cache, sampling = state['cache'], state['sampling']
  params = served_adapters.chosen_by(params, state['place'])
  positions = cache['shared']['index'][:, None]
  segment_ids = is_live[:, None].astype(jnp.int32)
  logits, cache, rows = _applied(
    model, params, state['token'][:, None], positions, segment_ids, cache
  )
  logits = _scores(logits[:, -1])
  if form == 'plain':
    drawn = slot_sampling.draw(logits, sampling)
  else:
    drawn = slot_sampling.draw_sorted(logits, sampling, stop_ids, mask)
  best = slot_sampling.best_of(logits, drawn) if form == 'logprobs' else None
  new = dict(
    cache=cache,
    sampling=slot_sampling.with_drawn(
      sampling, drawn, is_live, counts=form != 'plain'
    ),
    token=jnp.where(is_live, drawn, state['token']),
    place=state['place'],
  )
  return _like(new, state), drawn, best, rows


def prefill(
  state: State,
  params: dict,
  slot: jax.Array,
  tokens: jax.Array,
  count: jax.Array,
  is_last: jax.Array,
  mask: jax.Array,
  *,
  model: SlotModel,
  stop_ids: tuple[int, ...],
) -> tuple[State, jax.Array, slot_sampling.Best, Rows]:
  """Reads the first `count` of tokens [1, C], and draws after the last ones."""
  part = slots.take(state, slot)
  at = mesh.reshard((count - 1)[None], mesh.act('B'))
  logits, part, rows = _read(model, params, part, tokens, count, at)
  part, drawn, best = _first_drawn(part, logits[:, 0], stop_ids, mask, is_last)
  return _like(slots.put(state, part, slot), state), drawn, best, rows


def score(
  state: State,
  params: dict,
  slot: jax.Array,
  tokens: jax.Array,
  count: jax.Array,
  is_last: jax.Array,
  mask: jax.Array,
  targets: jax.Array,
  *,
  model: SlotModel,
  stop_ids: tuple[int, ...],
) -> tuple[State, jax.Array, slot_sampling.Best, Rows, slot_sampling.Best]:
  """`prefill`, and how probable the targets [C] of all places are."""
  part = slots.take(state, slot)
  logits, part, rows = _read(model, params, part, tokens, count, None)
  logits = _scores(logits[0])
  last = jax.lax.dynamic_slice_in_dim(logits, count - 1, 1)
  part, drawn, best = _first_drawn(part, last, stop_ids, mask, is_last)
  of_prompt = slot_sampling.best_of(logits, targets)
  new = _like(slots.put(state, part, slot), state)
  return new, drawn, best, rows, of_prompt


def see(
  model: SlotModel,
  state: State,
  params: dict,
  of_picture: dict,
  slot: jax.Array,
  picture: jax.Array,
) -> State:
  """A slot that has read nothing, with a picture [1, S, S, 3] in sight."""
  part = slots.take(state, slot)
  cache = model.see(params, of_picture, picture, part['cache'])
  return _like(slots.put(state, part | dict(cache=cache), slot), state)


def _applied(model, params, tokens, positions, segment_ids, cache, at=None):
  """Logits, the cache, and the rows read of tables with caches."""
  variables = {'params': params}
  args = tokens, positions, segment_ids, cache
  if not row_cache.is_used(params):
    logits, cache, _ = model.apply(variables, *args, logits_at=at)
    return logits, cache, {}
  (logits, cache, _), sown = model.apply(
    variables, *args, logits_at=at, mutable=['intermediates']
  )
  sown = sown['intermediates']
  return logits, cache, row_cache.reads(params, sown, segment_ids)


def _read(model, params, part, tokens, count, logits_at):
  """Logits of one slot's new tokens, the slot after them, and rows read."""
  offset = jnp.arange(tokens.shape[1])[None]
  is_token = offset < count
  params = served_adapters.chosen_by(params, part['place'])
  index = part['cache']['shared']['index']
  positions = mesh.reshard(index, mesh.act('.'))[:, None] + offset
  logits, cache, rows = _applied(
    model,
    params,
    tokens,
    positions,
    is_token.astype(jnp.int32),
    part['cache'],
    logits_at,
  )
  sampling = slot_sampling.with_prompt(part['sampling'], tokens, is_token)
  return logits, part | dict(cache=cache, sampling=sampling), rows


def _first_drawn(part, logits, stop_ids, mask, is_last):
  logits, sampling = _scores(logits), part['sampling']
  drawn = slot_sampling.draw_sorted(logits, sampling, stop_ids, mask)
  best = slot_sampling.best_of(logits, drawn)
  sampling = slot_sampling.with_drawn(
    sampling, drawn, is_last[None], counts=True
  )
  token = jnp.where(is_last, drawn, part['token'])
  return part | dict(sampling=sampling, token=token), drawn, best


def forget(config: ModelConfig, state: State, slot: jax.Array) -> State:
  """One slot with room for its next token, where histories are bounded."""
  part = slots.forget(config, slots.take(state['cache'], slot))
  cache = slots.put(state['cache'], part, slot)
  return _like(state | dict(cache=cache), state)


def snapshot(
  model: SlotModel,
  chunk: int,
  state: State,
  slot: jax.Array,
  begin: jax.Array,
) -> tuple[list[jax.Array], dict[str, Any]]:
  """The rows of one chunk, and all of the slot that is not in rows."""
  part = slots.take(state['cache'], slot)
  rows, rest = slots.split_rows(model, chunk, part, begin)
  in_prompt = slots.take(state['sampling'].in_prompt, slot)
  return rows, dict(cache=rest, in_prompt=in_prompt)


def insert(
  model: SlotModel,
  chunk: int,
  state: State,
  slot: jax.Array,
  begin: jax.Array,
  taken: tuple[list[jax.Array], dict[str, Any]],
) -> State:
  """One slot with what `snapshot` took from `begin` on."""
  rows, rest = taken
  part = slots.take(state['cache'], slot)
  part = slots.join_rows(model, chunk, part, begin, rows, rest['cache'])
  sampling = state['sampling']
  in_prompt = slots.put(sampling.in_prompt, rest['in_prompt'], slot)
  new = state | dict(
    cache=slots.put(state['cache'], part, slot),
    sampling=sampling._replace(in_prompt=in_prompt),
  )
  return _like(new, state)
