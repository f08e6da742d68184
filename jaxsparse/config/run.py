# SPDX-License-Identifier: Apache-2.0
"""Every configuration dataclass, one comment a field.

A recipe in `configs/` builds one `Config`; `--config.model.num_layers=6` on the
command line changes one field of it. The classes are mutable because
`overrides` assigns field by field; `validated` runs every check again
afterwards. Everything else treats them as constants.
"""

import dataclasses
import functools
import re
from typing import Any

from jaxsparse.config import fields
from jaxsparse.config.adapter import AdapterConfig, check_base
from jaxsparse.config.data import DataConfig
from jaxsparse.config.errors import (
  UserError,
  require,
  require_choice,
  require_fraction,
  require_not_negative,
  require_positive,
  require_unset,
)
from jaxsparse.config.model import ModelConfig
from jaxsparse.config.multimodal import MultiModalConfig, check_streams
from jaxsparse.config.tables import check_store

# What a process can take as a request, and a scheduler may send as one.
_STOP_SIGNALS = (
  *('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1', 'SIGUSR2'),
  *('SIGXCPU', 'SIGQUIT', 'SIGALRM'),
)


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class OptimizerConfig:
  """AdamW with a schedule of its rate, and a labelled group for values."""

  # Optimizer of the matrices of attention, MLPs, experts and memory layers:
  # 'adamw', or 'muon', whose steps are as large as AdamW's and so take the same
  # learning_rate and weight_decay. Embeddings, head, norms, biases, routers,
  # keys and cores stay with AdamW.
  name: str = 'adamw'
  # Peak of the learning rate.
  learning_rate: float = 3e-3
  # Steps of linear warm-up; a run of no more steps has a tenth of them.
  warmup_steps: int = 50
  # What the rate does behind the warm-up: 'cosine' falls until the last step;
  # 'infinite' falls to a constant, at which a run can go on for ever, and
  # leaves it in the last steps alone (arXiv:2403.08763).
  schedule: str = 'cosine'
  # Of 'infinite': steps of the fall to the constant, and that as a share of the
  # peak.
  cooldown_steps: int = 0
  constant_lr_fraction: float = 1.0
  # Of 'infinite': last steps, over which the rate falls to final_lr_fraction;
  # 0: it stays, to go on from there with more train.num_steps.
  anneal_steps: int = 0
  # Learning rate at the end, as a share of the peak.
  final_lr_fraction: float = 0.1
  # Decay rates of the first and second moments.
  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8
  # Decay of Muon's momentum.
  muon_momentum: float = 0.95
  # Decoupled decay of matrices; norms, biases, cores and values are left out.
  weight_decay: float = 0.1
  # Decoupled decay of the value tables.
  value_weight_decay: float = 0.0
  # Multiplier of the value tables' learning rate at step 0; it falls linearly
  # to 1 over the first value_lr_decay_fraction of training.
  value_lr_multiplier: float = 1.0
  value_lr_decay_fraction: float = 1.0
  # Constant learning rate of the value tables, without warm-up or decay, as PKM
  # and Memory+ have it; 0 for the multiple above.
  value_learning_rate: float = 0.0
  # Optimizer of the value tables: 'adamw', or one whose cost follows the rows
  # that a step reads: 'row_adam' (an absent row gets AdamW's missed steps when
  # it returns), 'lazy_row_adam' (it does not), 'row_adagrad' (one rate a row).
  # Which there are, `training.optimizer.ROW_OPTIMIZERS` knows.
  value_optimizer: str = 'adamw'
  # Rows of a table whose gradient is held at once by a row optimizer; more take
  # more passes. 0: all that a step can read.
  value_row_budget: int = 0
  # Keep a float32 copy of bfloat16 tables; without it their updates are rounded
  # stochastically.
  value_master: bool = False
  # Only leaves whose path this regular expression finds are trained, such as
  # 'sparse/router', 'dcmha' or 'value_table'; the others stay as they are, and
  # have no gradient and no moments in memory. Empty: all.
  trained: str = ''
  # Largest global norm of the gradient; 0 does not clip.
  clip_norm: float = 1.0
  # Micro-batches whose gradients make one step. It is the step of the whole
  # batch but for losses of experts' load, of blocks and of their router, which
  # are of a micro-batch.
  grad_accumulation: int = 1

  def __post_init__(self):
    fields.check(self)
    require_positive(self, 'learning_rate', 'epsilon', 'value_lr_multiplier')
    require_positive(self, 'value_lr_decay_fraction', 'grad_accumulation')
    require_fraction(self, 'final_lr_fraction', 'value_lr_decay_fraction')
    require_choice(self, 'name', ('adamw', 'muon'))
    self._check_schedule()
    require_not_negative(self, 'value_row_budget')
    require(
      self.value_optimizer != 'row_adagrad' or self.value_weight_decay == 0,
      'value_weight_decay must be 0 with row_adagrad, which has none; got '
      f'{self.value_weight_decay}.',
    )
    require(
      self.value_optimizer != 'row_adam' or self.b1**2 < self.b2,
      f'b1 must be below the square root of b2 = {self.b2} with row_adam, got '
      f'{self.b1}.',
    )
    for name in ('b1', 'b2', 'muon_momentum'):
      value = getattr(self, name)
      require(0 <= value < 1, f'{name} must be within 0 and 1, got {value}.')
    require_not_negative(
      self, 'warmup_steps', 'weight_decay', 'value_weight_decay', 'clip_norm'
    )
    require_not_negative(self, 'value_learning_rate')
    try:
      re.compile(self.trained)
    except re.error as error:
      raise UserError(
        f'trained must be a regular expression, got {self.trained!r}: {error}.'
      ) from None
    unset = functools.partial(require_unset, self)
    unset(self.name == 'adamw', "name = 'adamw'", 'muon_momentum')
    unset(
      self.value_learning_rate > 0,
      f'value_learning_rate = {self.value_learning_rate}',
      'value_lr_multiplier',
      'value_lr_decay_fraction',
    )
    unset(
      self.value_lr_multiplier == 1,
      'value_lr_multiplier = 1',
      'value_lr_decay_fraction',
    )
    unset(
      self.value_optimizer == 'adamw',
      "value_optimizer = 'adamw'",
      'value_row_budget',
    )

  def _check_schedule(self):
    require_choice(self, 'schedule', ('cosine', 'infinite'))
    require_not_negative(self, 'cooldown_steps', 'anneal_steps')
    unset = functools.partial(require_unset, self)
    unset(
      self.schedule == 'cosine',
      "schedule = 'cosine'",
      'cooldown_steps',
      'constant_lr_fraction',
      'anneal_steps',
    )
    if self.schedule == 'cosine':
      return
    require(
      0 < self.constant_lr_fraction <= 1,
      'constant_lr_fraction must be above 0 and at most 1, got '
      f'{self.constant_lr_fraction}.',
    )
    unset(not self.cooldown_steps, 'cooldown_steps = 0', 'constant_lr_fraction')
    unset(not self.anneal_steps, 'anneal_steps = 0', 'final_lr_fraction')
    require(
      not self.anneal_steps
      or 0 < self.final_lr_fraction <= self.constant_lr_fraction,
      'final_lr_fraction must be above 0 and at most constant_lr_fraction = '
      f'{self.constant_lr_fraction}, got {self.final_lr_fraction}.',
    )

  def warmup_within(self, num_steps: int) -> int:
    """Steps of warm-up in a run of `num_steps`."""
    is_short = num_steps <= self.warmup_steps
    return num_steps // 10 if is_short else self.warmup_steps


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class TrainConfig:
  """How long, how often, from which seed."""

  # Optimizer steps in all.
  num_steps: int = 600
  # Workdir of another run, or of an import, whose parameters a new run begins
  # with, 'WORKDIR' or 'WORKDIR@STEP'; STEP may be 'best'. Its tokenizer comes
  # along, and its config is the recipe where none is named. Empty: parameters
  # are drawn.
  start_from: str = ''
  # Seed of parameters, data order and dropout.
  seed: int = 0
  # A metrics line every so many steps.
  log_every: int = 10
  # A checkpoint every so many steps, and at the end.
  save_every: int = 100
  # Newest checkpoints that are kept.
  keep_checkpoints: int = 2
  # Besides them, checkpoints of the lowest validation loss that are kept; steps
  # of eval_every that are among those are saved. generate has --step=best.
  keep_best: int = 0
  # A full validation pass every so many steps, and at the end; 0: at the end.
  eval_every: int = 0
  # Bytes of the text that was learned before which such a pass reads besides,
  # to measure what is forgotten: taken evenly from the whole of its validation
  # part. 0: none.
  old_text_bytes: int = 2**18
  # What asks to save and stop, as a cluster does before a job's time is over:
  # of SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU, SIGQUIT, SIGALRM.
  stop_signals: tuple[str, ...] = (
    'SIGTERM',
    'SIGINT',
    'SIGHUP',
    'SIGUSR1',
    'SIGUSR2',
  )
  # What the sample at the end begins with, and its length in tokens.
  sample_prompt: str = 'def '
  sample_tokens: int = 200
  # Project of Weights & Biases that gets the metrics too (extra `wandb`; its
  # own variables, such as WANDB_MODE=offline, say how); empty: none.
  wandb_project: str = ''

  def __post_init__(self):
    fields.check(self)
    require_positive(self, 'num_steps', 'log_every', 'save_every')
    require_positive(self, 'keep_checkpoints')
    require_not_negative(
      self, 'seed', 'keep_best', 'eval_every', 'sample_tokens', 'old_text_bytes'
    )
    require(
      self.eval_every > 0 or self.keep_best == 0,
      'eval_every must be positive with keep_best, which goes by its passes; '
      f'got {self.eval_every}.',
    )
    require_unset(
      self, self.sample_tokens == 0, 'sample_tokens = 0', 'sample_prompt'
    )
    for name in self.stop_signals:
      require(
        name in _STOP_SIGNALS,
        f'stop_signals must be of {", ".join(_STOP_SIGNALS)}; got {name!r}.',
      )


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class MeshConfig:
  """Devices along each axis of the mesh."""

  # Splits the batch and spreads dense parameters; -1: all remaining devices.
  data: int = -1
  # Splits the batch and the value tables, see memory.table.scheme.
  sparse: int = 1
  # Splits heads, the MLP's width and the columns of value tables.
  model: int = 1

  def __post_init__(self):
    fields.check(self)
    require(
      self.data == -1 or self.data > 0,
      f'mesh.data must be positive, or -1 for all that are left; '
      f'got {self.data}.',
    )
    for name in ('sparse', 'model'):
      value = getattr(self, name)
      require(value > 0, f'mesh.{name} must be positive, got {value}.')


@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class Config:
  """A whole run."""

  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  # Pictures or frames beside the text of `model`; None for text alone.
  multimodal: MultiModalConfig | None = None

  def __post_init__(self):
    require(
      self.data.batch_size % self.optimizer.grad_accumulation == 0,
      f'grad_accumulation must divide batch_size = {self.data.batch_size}, '
      f'got {self.optimizer.grad_accumulation}.',
    )
    num_steps, annealed = self.train.num_steps, self.optimizer.anneal_steps
    require(
      annealed <= num_steps,
      f'anneal_steps must be at most num_steps = {num_steps:,}, got '
      f'{annealed:,}.',
    )
    warmup = self.optimizer.warmup_within(num_steps)
    require(
      not annealed or warmup + annealed <= num_steps,
      f'anneal_steps must be at most {num_steps - warmup:,}, the steps behind '
      f'the {warmup:,} of warm-up, else the peak is never reached; got '
      f'{annealed:,}: take fewer, or warmup_steps = 0.',
    )
    require(
      bool(self.multimodal) == bool(self.data.pairs),
      'data.pairs and multimodal belong together, the pictures and the model '
      f'that reads them; got data.pairs = {self.data.pairs!r} and '
      f'{"a" if self.multimodal else "no"} multimodal.',
    )
    if self.multimodal:
      check_streams(self.model, self.multimodal)
      self._check_pairs()
    require(
      bool(self.multimodal) or self.model.is_causal,
      'model.is_causal must be True for a language model, or a position would '
      'see the token that it is to predict; got False: set it, or multimodal.',
    )
    self._check_values()
    check_base(self.adapter, self.train, self.optimizer)

  def _check_pairs(self):
    """Refuses what text alone has, and wrong texts that nothing reads."""
    assert self.multimodal is not None
    settings = self.multimodal
    require_unset(
      self.data,
      not (settings.contrastive_weight or settings.matching_weight),
      'multimodal.contrastive_weight and matching_weight = 0',
      'distractors',
    )
    require(
      self.data.batch_size > 1
      or self.data.distractors
      or not (settings.contrastive_weight or settings.matching_weight),
      'data.batch_size must be at least 2 where multimodal.contrastive_weight '
      'or matching_weight is above 0, which tell a pair from others of its '
      f'batch; got {self.data.batch_size}.',
    )
    optimizer, table = self.optimizer, self.model.memory
    for name, value, right, why in (
      ('optimizer.grad_accumulation', optimizer.grad_accumulation, 1,
       'as all pairs of a batch are compared'),
      ('optimizer.value_optimizer', optimizer.value_optimizer, 'adamw',
       'as tables of two streams have no gradient by rows'),
      ('model.memory.table.store', table.table.store if table else 'device',
       'device', 'as only the language model reads others'),
      ('adapter.kind', self.adapter.kind, '', 'as adapters are of text models'),
      ('train.start_from', self.train.start_from, '',
       'as other runs have no pictures'),
      ('train.sample_tokens', self.train.sample_tokens, 0,
       'as nothing is written without a picture'),
    ):  # fmt: skip
      require(
        value == right,
        f'{name} must be {right!r} with multimodal, {why}; got {value!r}.',
      )

  def _check_values(self):
    """Refuses settings of value tables that would do nothing."""
    unset = functools.partial(require_unset, self.optimizer)
    memory = self.model.memory
    names = [n for n in fields.hints(OptimizerConfig) if n.startswith('value_')]
    beside = self.model.beside_mlp
    has_values = [n for n, x in beside.items() if x.num_values(1)]
    is_none = memory is None and not has_values
    unset(is_none, 'model.memory = None', *names)
    require(
      self.optimizer.value_optimizer == 'adamw' or not has_values,
      f"value_optimizer must be 'adamw' with model.{''.join(has_values[:1])}, "
      'whose table has no gradient by rows; got '
      f'{self.optimizer.value_optimizer!r}.',
    )
    if memory:
      table, optimizer = memory.table, self.optimizer.value_optimizer
      is_wide = table.dtype == 'float32'
      unset(is_wide, "memory.table.dtype = 'float32'", 'value_master')
      makes_rows = optimizer != 'adamw' and table.gradient == 'sorted'
      require_unset(
        table, makes_rows, f'value_optimizer = {optimizer!r}', 'gradient'
      )
      check_store(table, self.optimizer)


def validated(config: Any) -> Any:
  """A copy in which every check has run again, inner classes first.

  Raises:
    UserError: one sentence that names the field, its value and what is right.
  """
  copies = {}
  for name in fields.hints(type(config)):
    value = getattr(config, name)
    is_part = dataclasses.is_dataclass(value)
    copies[name] = validated(value) if is_part else value
  return type(config)(**copies)
