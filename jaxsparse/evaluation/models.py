# SPDX-License-Identifier: Apache-2.0
"""A workdir's model as a scorer."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal

import jax

from jaxsparse import mesh
from jaxsparse.config.errors import require
from jaxsparse.data.tokenizer import load_from_workdir
from jaxsparse.evaluation import store
from jaxsparse.evaluation.scorer import BATCH_TOKENS, Scorer
from jaxsparse.inference import weights
from jaxsparse.inference.quantize import Quantization
from jaxsparse.run import (
  adapter_files,
  compiled_programs,
  run_config,
  trained,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How a model is loaded; None for the default."""

  step: int | Literal['best'] | None = None
  # Tokens that the model reads at most; by default as many as in training.
  max_length: int | None = None
  batch_tokens: int = BATCH_TOKENS
  # Over which batches are split.
  devices: int = 1
  # To quantize it as it is loaded.
  quantization: Quantization | None = None
  # Where the tables lie; empty: as the run has them.
  tables: str = ''
  # Folders of adapters to be added, and whether those of another base are.
  adapters: tuple[str, ...] = ()
  is_forced: bool = False


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A model, and on what its scores depend."""

  scorer: Scorer
  step: int
  settings: dict


@contextlib.contextmanager
def load(
  workdir: str, options: Options, say: Callable[[str], None]
) -> Iterator[Loaded]:
  """The model of a workdir; its mesh is in use until the block ends.

  Args:
    workdir: of a training run, or converted.
    options: which checkpoint, and how it is used.
    say: gets warnings.

  Raises:
    UserError: the workdir is none, or can't be used so.
  """
  require(
    jax.process_count() == 1,
    f'evaluate runs in one process, got {jax.process_count()}.',
  )
  count = len(jax.devices())
  require(
    1 <= options.devices <= count,
    f'--devices must be within 1 and {count}, got {options.devices}.',
  )
  config = run_config.read(workdir, say)
  compiled_programs.keep(say=say)
  tokenizer = load_from_workdir(workdir, config.model.vocab_size)
  model = config.model.with_vocabulary(tokenizer.vocab_size)
  max_length = options.max_length or config.data.seq_len
  if max_length > config.data.seq_len:
    say(
      f'warning: --max-len={max_length} is more than the '
      f'{config.data.seq_len} tokens of training; what lies beyond may be poor.'
    )
  devices, scope = None, contextlib.nullcontext()
  if options.devices > 1:
    devices = mesh.make_mesh(devices=jax.devices()[: options.devices])
    scope = jax.set_mesh(devices)
  step = trained.step_of(workdir, options.step)
  how = options.quantization
  step, params = weights.load(
    workdir, model, step, devices, say, how, options.tables, options.adapters,
    options.is_forced, is_folded=True,
  )  # fmt: skip
  settings = store.model_settings(workdir, step) | dict(
    max_len=max_length, dtype=model.dtype
  )
  if options.adapters:
    read = adapter_files.read_meta
    settings['adapters'] = [read(x)['sha256'] for x in options.adapters]
  if how:
    settings['quantization'] = dataclasses.asdict(how)
  with scope:
    scorer = Scorer(model, params, tokenizer, max_length, options.batch_tokens)
    yield Loaded(scorer, step, settings)
