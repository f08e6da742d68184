# SPDX-License-Identifier: Apache-2.0
"""language: every architecture of a suite trained on one text, one seed each.

What `jaxsparse compare` does, for a machine that is lent for minutes and has no
packages that load data: bytes of a text that fits in memory, nothing saved but
the rows. All get the same batches, drawn by the suite's seed, and the same
validation pass over the text's last part. Before each model the time it may
take, which is the longest of the others, is compared with what is left of
`minutes`; a model that runs out of them is left out.

Programs of four models are compiled side by side before the first of them.
"""

import argparse
import dataclasses
import functools
import hashlib
import math
import pathlib
import time
from collections.abc import Iterator

import jax
import numpy as np

from jaxsparse.analysis import budget, cost
from jaxsparse.config import Config
from jaxsparse.config.errors import require
from jaxsparse.data import documents, formats, python_text
from jaxsparse.experiments.bench import measuring
from jaxsparse.experiments.compare import suite as suite_lib
from jaxsparse.training.language import eval_step
from jaxsparse.training.step import TrainState, finalize, init_state, train_step

OPTIONS = dict(
  # In configs/compare, or a file.
  suite='h100',
  # Architectures of it in this order, with commas between.
  models='dense,moe,pkm,ultramem,memory_plus,ultramem_v2',
  # Paths of files, plain or compressed; Python's own sources by default.
  text='',
  # Optimizer steps; 0: the suite's.
  steps=0,
  minutes=9.0,
)

_BOUNDARY = 256
# Tokens of the validation pass, at most.
_MOST_VALIDATION = 1 << 22
# Models that are compiled at once.
_SIDE_BY_SIDE = 4
# Steps of which a point of the loss curve is the mean.
_POINT = 10


@dataclasses.dataclass(frozen=True)
class Text:
  """Bytes of documents, uint16 [n], with a boundary behind each."""

  train: np.ndarray
  validation: np.ndarray
  digest: str


@dataclasses.dataclass(frozen=True)
class Programs:
  """A model's compiled programs."""

  init: jax.stages.Compiled
  train: jax.stages.Compiled
  evaluate: jax.stages.Compiled


def measure(options: argparse.Namespace) -> Iterator[dict]:
  """A record of each model that was trained to the end.

  Raises:
    UserError: the suite or the text can't be used.
  """
  end = time.monotonic() + 60 * options.minutes
  configs = make_configs(options)
  base = next(iter(configs.values()))
  text = read_text(options.text, base)
  print(
    f'{len(text.train):,} tokens of training text, '
    f'{len(text.validation):,} of validation; {base.train.num_steps:,} steps of'
    f' {base.data.batch_size * base.data.seq_len:,}.',
    flush=True,
  )
  programs, longest, names = {}, 0.0, list(configs)
  for index, (name, config) in enumerate(configs.items()):
    start = time.monotonic()
    if start + longest > end:
      print(
        f'{name}: left out, as {(end - start) / 60:.1f} minutes are left and '
        f'it may take {longest / 60:.1f}.',
        flush=True,
      )
      continue
    if name not in programs:
      coming = names[index : index + _SIDE_BY_SIDE]
      programs |= measuring.in_threads(
        _compile, {n: configs[n] for n in coming}
      )
      start = time.monotonic()
    found = programs.pop(name)
    if isinstance(found, Programs):
      found = _or_error(lambda c=config, p=found: _train(c, p, text, end))
    if isinstance(found, Exception):
      print(f'{name}: failed: {str(found).splitlines()[0]}', flush=True)
    elif found is None:
      print(f'{name}: left out, it took longer than was left.', flush=True)
    else:
      yield dict(contender=name) | found | dict(text=text.digest)
    longest = max(longest, time.monotonic() - start)


def make_configs(options: argparse.Namespace) -> dict[str, Config]:
  """The configs by architecture, of equal FLOPs per token.

  Raises:
    UserError: the suite has no such architecture, or not one of bytes.
  """
  suite = suite_lib.restrict(
    suite_lib.load(options.suite),
    only=tuple(options.models.split(',')),
    num_steps=options.steps,
  )
  require(
    not suite.people
    and not suite.needles
    and suite.base.model.vocab_size > _BOUNDARY,
    f'suite must be one of language in bytes, got {options.suite!r}.',
  )
  names = options.models.split(',')
  return {name: suite_lib.config_of(suite, name) for name in names}


def read_text(paths: str, config: Config) -> Text:
  """The text, split as `config` says its shares are.

  Raises:
    UserError: there is no such text, or it is too short for a batch.
  """
  found = documents.match(paths) if paths else python_text.documents()
  parts = []
  for document in found:
    with document.open() as raw:
      path = document.path or pathlib.PurePath(document.name)
      content = formats.open_text(raw, path).read()
    parts.append(np.frombuffer(content, np.uint8).astype(np.uint16))
    parts.append(np.array([_BOUNDARY], np.uint16))
  tokens = np.concatenate(parts)
  share = int(len(tokens) * config.data.validation_fraction)
  validation = tokens[len(tokens) - share :][:_MOST_VALIDATION]
  batch = config.data.batch_size * config.data.seq_len
  require(
    len(validation) > batch,
    f'text must have a validation part of more than a batch, {batch:,} bytes; '
    f'{paths or "the sources of Python"!r} has one of {len(validation):,}.',
  )
  digest = hashlib.sha256(tokens.tobytes()).hexdigest()[:16]
  return Text(tokens[: len(tokens) - share], validation, digest)


def batches(tokens: np.ndarray, config: Config, seed: int) -> Iterator[dict]:
  """Endless batches [B, T]; each epoch has an order of its own."""
  data, rng = config.data, np.random.default_rng(seed)
  num_rows = (len(tokens) - 1) // data.seq_len
  waiting = np.zeros(0, np.int64)
  while True:
    while len(waiting) < data.batch_size:
      waiting = np.concatenate([waiting, rng.permutation(num_rows)])
    rows, waiting = np.split(waiting, [data.batch_size])
    yield _batch(tokens, rows, data.seq_len)


def validation_batches(tokens: np.ndarray, config: Config) -> Iterator[dict]:
  """One pass in order, but for what fills no batch."""
  data = config.data
  num_rows = (len(tokens) - 1) // data.seq_len
  for first in range(0, num_rows - data.batch_size + 1, data.batch_size):
    rows = np.arange(first, first + data.batch_size)
    yield _batch(tokens, rows, data.seq_len)


def _batch(tokens, rows, seq_len):
  place = rows[:, None] * seq_len + np.arange(seq_len)
  return dict(
    tokens=tokens[place].astype(np.int32),
    targets=tokens[place + 1].astype(np.int32),
    positions=np.broadcast_to(np.arange(seq_len, dtype=np.int32), place.shape),
    segment_ids=np.ones(place.shape, np.int32),
    loss_weight=np.ones(place.shape, np.float32),
  )


def abstract_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  shape = (config.data.batch_size, config.data.seq_len)
  batch = _batch(np.zeros(2, np.uint16), np.zeros(1, np.int64), 1)
  return {n: jax.ShapeDtypeStruct(shape, x.dtype) for n, x in batch.items()}


def lower(config: Config) -> dict[str, jax.stages.Lowered]:
  """The programs by name; the state that a step gets is donated."""
  batch = abstract_batch(config)
  init = jax.jit(functools.partial(init_state, config))
  state = jax.eval_shape(init)
  train = jax.jit(functools.partial(train_step, config), donate_argnums=0)
  evaluate = jax.jit(functools.partial(eval_step, config))
  return dict(
    init=init.lower(),
    train=train.lower(state, batch),
    evaluate=evaluate.lower(state.params, batch),
  )


def _compile(config):
  lowered = lower(config)
  return _or_error(
    lambda: Programs(**{n: program.compile() for n, program in lowered.items()})
  )


def _or_error(function):
  """What it returns or why it failed; there are other models to train."""
  try:
    return function()
  except jax.errors.JaxRuntimeError as error:
    return error


def _train(
  config: Config, programs: Programs, text: Text, end: float
) -> dict | None:
  """What the model became; None where `end` came first."""
  state: TrainState = programs.init()
  total, losses = config.train.num_steps, []
  drawn = batches(text.train, config, config.train.seed)
  digest = hashlib.sha256()
  start = time.monotonic()
  for step in range(total):
    batch = next(drawn)
    digest.update(batch['tokens'].tobytes())
    state, metrics = programs.train(state, batch)
    losses.append(metrics['loss'])
    # The next step is prepared while the device works on this one.
    jax.block_until_ready(losses[max(0, step - 1)])
    if time.monotonic() > end:
      return None
  losses = np.array(jax.device_get(losses))
  seconds = time.monotonic() - start
  params = jax.jit(functools.partial(finalize, config))(state).params
  del state
  nats = num_targets = num_bytes = 0.0
  for batch in validation_batches(text.validation, config):
    sums = programs.evaluate(params, batch)
    nats += float(sums['nats'])
    num_targets += float(sums['targets'])
    num_bytes += float((batch['targets'] != _BOUNDARY).sum())
  num_tokens = total * config.data.batch_size * config.data.seq_len
  parameters = cost.count_parameters(config.model)
  flops = cost.forward_flops(config.model, config.data.seq_len)
  memory = programs.train.memory_analysis()
  points = np.array_split(losses, max(1, total // _POINT))
  return dict(
    validation_loss=nats / num_targets,
    bits_per_byte=nats / math.log(2) / num_bytes,
    training_loss=float(losses[-max(1, total // 10) :].mean()),
    num_tokens=num_tokens,
    seconds=seconds,
    tokens_per_second=num_tokens / seconds,
    share_of_matmul=(
      3 * flops * num_tokens / seconds / measuring.matmul_rate()[0]
    ),
    parameters=parameters.published,
    flops_per_token=flops,
    sizes=budget.describe(config.model),
    temp_bytes=memory.temp_size_in_bytes,
    argument_bytes=memory.argument_size_in_bytes,
    batches=digest.hexdigest()[:16],
    curve=[float(point.mean()) for point in points],
  )


def show(records: list[dict]) -> None:
  if len(records) == 1:
    print(
      f'{"model":<14}{"nats/token":>12}{"to first":>10}{"bits/byte":>11}'
      f'{"parameters":>12}{"tokens/s":>12}{"of matmul":>11}{"minutes":>9}'
    )
  r = records[-1]
  print(
    f'{r["contender"]:<14}{r["validation_loss"]:>12.4f}'
    f'{r["validation_loss"] - records[0]["validation_loss"]:>+10.4f}'
    f'{r["bits_per_byte"]:>11.4f}{r["parameters"] / 1e6:>10.0f} M'
    f'{r["tokens_per_second"]:>12,.0f}{r["share_of_matmul"]:>11.0%}'
    f'{r["seconds"] / 60:>9.2f}'
  )
