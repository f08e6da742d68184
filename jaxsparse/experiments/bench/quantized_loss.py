# SPDX-License-Identifier: Apache-2.0
"""quantized_loss: bits per byte that a trained model loses in fewer bits.

One text is scored in windows by the model in each form. 'lost' is the
difference to float32, window by window, with its standard error. Bytes are
those of the tables, and of all else. Several workdirs are the same model of
other seeds: figures are means over them, and their own are kept beside. With
--people, models of the suite of facts (`compare --keep`) are asked for these as
well: 'recall' is the share that they have.

Every form is turned into numbers before it is scored, so that one program does
for all; `quantized_forms` has them.
"""

import argparse
import dataclasses
import functools
import math
import statistics
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config import Config, ModelConfig
from jaxsparse.config.errors import require
from jaxsparse.data.facts import People, make_people
from jaxsparse.data.tokenizer import Tokenizer, load_from_workdir
from jaxsparse.evaluation.encoding import Encoded
from jaxsparse.evaluation.metrics import Metric
from jaxsparse.evaluation.scorer import Score, Scorer
from jaxsparse.evaluation.tasks import TextTask
from jaxsparse.experiments.bench.quantized_forms import FORMS, Form, applied
from jaxsparse.experiments.compare import recall
from jaxsparse.inference import quantized_leaves
from jaxsparse.inference.calibration import windows
from jaxsparse.inference.quantize import bytes_by_part
from jaxsparse.inference.text import read_file
from jaxsparse.nn.transformer import Transformer, init_cache
from jaxsparse.run import run_config

OPTIONS = dict(
  # With commas between.
  workdir='',
  # Number of people whose facts the models were trained on, by their own seed.
  people=0,
  # Files; by default what the model was validated on and trained on.
  text='',
  calibrate='',
  # Bytes of either that are used, at most.
  bytes=65_536,
  # Tokens of a window; 0 for as many as in training.
  window=0,
  # With commas between; '' for all that the model has.
  forms='',
)

# Bits per byte that a form may lose.
AIMS = {'tables int8': 0.0005, 'tables int4': 0.002, 'dense int8': 0.002}


# Logits of one call, at most.
_MOST_LOGITS = 1 << 24


def measure(options: argparse.Namespace) -> Iterator[dict]:
  """Records of all forms, that of float32 first.

  Raises:
    UserError: an option has no sense, or a file can't be read.
  """
  require(bool(options.workdir), '--workdir must name a trained model.')
  for name, least in (('bytes', 1), ('window', 0), ('people', 0)):
    value = getattr(options, name)
    require(value >= least, f'{name} must be at least {least}, got {value}.')
  names = [n for n in options.forms.split(',') if n] or list(FORMS)
  for name in names:
    require(name in FORMS, f'forms must be of {list(FORMS)}, got {name!r}.')
  models = [
    _Model.of(workdir, options, names) for workdir in options.workdir.split(',')
  ]
  first = models[0].config
  for model, workdir in zip(models, options.workdir.split(','), strict=True):
    require(
      model.config == first,
      f'--workdir must name runs of one model, but {workdir!r} has another '
      f'than {options.workdir.split(",")[0]!r}.',
    )
  whole = []
  for name in ['f32', *names]:
    form = FORMS[name]
    is_of_tables = form.rows is not None or 'tables' in form.how
    if name == 'f32' and whole:
      continue
    if is_of_tables and not _has_tables(models[0].params):
      continue
    found = [model.scored(form) for model in models]
    whole = whole or found
    yield dict(form=name) | _means(found, whole)


@dataclasses.dataclass(frozen=True)
class _Scored:
  """What a model makes of the text, and its share of the facts."""

  # Bytes of the parts.
  sizes: dict[str, int]
  bits: Metric
  windows: int
  text_bytes: int
  recall: float | None


@dataclasses.dataclass(frozen=True)
class _Model:
  """A trained model, and the text that it is scored on."""

  config: ModelConfig
  params: dict
  tokenizer: Tokenizer
  text: str
  # Token ids [N, T] that matrices are rounded by.
  sequences: np.ndarray
  window: int
  people: People | None

  @classmethod
  def of(
    cls, workdir: str, options: argparse.Namespace, names: Sequence[str]
  ) -> '_Model':
    config = run_config.read(workdir)
    tokenizer = load_from_workdir(workdir)
    model = config.model.with_vocabulary(tokenizer.vocab_size)
    config = dataclasses.replace(config, model=model)
    text, calibration = _texts(options, config, names)
    _, params = quantized_leaves.load_params(workdir)
    window = options.window or config.data.seq_len
    people = None
    if options.people:
      people = make_people(options.people, config.train.seed)
    sequences = _sequences(tokenizer, calibration, window)
    return cls(model, params, tokenizer, text, sequences, window, people)

  def scored(self, form: Form) -> _Scored:
    numbers, sizes = applied(form, self.config, self.params, self.sequences)
    scorer = Scorer(self.config, numbers, self.tokenizer, self.window)
    task = TextTask('text', [self.text], window=self.window)
    encodings = task.encode(scorer)
    if form.by_cache:
      scores = _scores_by_cache(self.config, numbers, encodings.sequences)
    else:
      scores = scorer.scores(encodings.sequences)
    metrics = task.measure(encodings, scores, self.tokenizer)
    share = None
    if self.people is not None:
      forward = recall.model_forward(self.config, numbers)
      if form.by_cache:
        forward = functools.partial(_forward_by_cache, self.config, numbers)
      share = recall.measure(forward, self.tokenizer, self.people).share
    return _Scored(
      sizes,
      metrics['bits_per_byte'],
      len(scores),
      len(self.text.encode()),
      share,
    )


def _means(found: Sequence[_Scored], whole: Sequence[_Scored]) -> dict:
  """Of models in one form; `whole` are the same in float32."""
  lost = [x.bits.minus(y.bits) for x, y in zip(found, whole, strict=True)]
  errors = [x.error for x in lost if x is not None and x.error is not None]
  record = dict(
    windows=found[0].windows,
    text_bytes=found[0].text_bytes,
    **found[0].sizes,
    bits_per_byte=statistics.fmean(x.bits.value for x in found),
    lost=statistics.fmean(x.value for x in lost if x is not None),
    # Of the mean, by the windows of each model.
    lost_stderr=math.hypot(*errors) / len(lost) if errors else None,
  )
  if len(found) > 1:
    record['lost_by_model'] = [x.value for x in lost if x is not None]
  shares = [x.recall for x in found if x.recall is not None]
  if shares:
    record |= dict(recall=statistics.fmean(shares), recall_by_model=shares)
  return record


def _scores_by_cache(
  config: ModelConfig, params: dict, sequences: Sequence[Encoded]
) -> list[Score]:
  """Scores of windows of equal length, keys and values in 8 bits."""
  config = dataclasses.replace(config, kv_cache='int8')
  length = sequences[0].length
  size = max(1, _MOST_LOGITS // (length * config.vocab_size))
  size, found = min(size, len(sequences)), []
  for begin in range(0, len(sequences), size):
    # The last ones again, where there are fewer: one program does for all.
    batch = sequences[max(0, min(begin, len(sequences) - size)) :][:size]
    tokens = np.stack([s.tokens for s in batch])
    counts = np.array([s.num_targets for s in batch], np.int32)
    logprobs = np.asarray(_logprobs_by_cache(config, params, tokens, counts))
    new = min(size, len(sequences) - begin)
    found += [Score(float(x), False) for x in logprobs[-new:]]
  return found


@functools.partial(jax.jit, static_argnums=0)
def _logprobs_by_cache(config, params, tokens, counts):
  fed, of_next = tokens[:, :-1], tokens[:, 1:, None]
  at = jnp.broadcast_to(jnp.arange(fed.shape[1]), fed.shape)
  batch = dict(tokens=fed, positions=at, segment_ids=jnp.ones_like(fed))
  log_probs = jax.nn.log_softmax(_logits_by_cache(config, params, batch))
  of_next = jnp.take_along_axis(log_probs, of_next, axis=-1)[..., 0]
  is_scored = at >= fed.shape[1] - counts[:, None]
  return jnp.where(is_scored, of_next, 0).sum(1)


def _logits_by_cache(config, params, batch):
  cache = init_cache(config, *batch['tokens'].shape)
  inputs = (*(batch[n] for n in ('tokens', 'positions', 'segment_ids')), cache)
  return Transformer(config).apply({'params': params}, *inputs)[0]


@functools.partial(jax.jit, static_argnums=0)
def _forward_by_cache(config, params, batch):
  """Logits of questions, keys and values in 8 bits."""
  config = dataclasses.replace(config, kv_cache='int8')
  return _logits_by_cache(config, params, batch)


def _has_tables(params):
  return 'tables' in bytes_by_part(params)


def _texts(options, config: Config, names: Sequence[str]) -> list[str]:
  """What is scored, and what matrices are rounded by if any are."""
  found = []
  by_text = any(FORMS[name].by_text for name in names)
  corpus = None
  for flag, split in (('text', 'validation'), ('calibrate', 'train')):
    path = getattr(options, flag)
    if flag == 'calibrate' and not by_text:
      found.append('')
    elif path:
      content = read_file(f'--{flag}=', path).encode()
      found.append(_cut(content, options.bytes))
    else:
      # Not above: other benches do without packages for data.
      from jaxsparse.data.corpus import build_corpus

      corpus = corpus or build_corpus(config.data)
      content = b''
      for piece in getattr(corpus, split):
        content += piece.text
        if len(content) >= options.bytes:
          break
      found.append(_cut(content, options.bytes))
  return found


def _cut(content: bytes, size: int) -> str:
  # Without a character's first bytes at the end.
  return content[:size].decode(errors='ignore')


def _sequences(tokenizer, text, window):
  if not text:
    return np.zeros((0, window), np.int32)
  # Inputs, without the last of what follows them.
  return windows(tokenizer, text, window + 1, '--calibrate')[:, :-1]


def show(records: list[dict]) -> None:
  r = records[-1]
  if len(records) == 1:
    print(
      f'{r["text_bytes"]:,} bytes of text in {r["windows"]} windows\n'
      f'{"form":<26}{"tables":>12}{"all else":>12}{"bits/byte":>11}'
      f'{"lost":>10}{"+-":>9}' + ('  recall' if 'recall' in r else '')
    )
  error = r['lost_stderr']
  print(
    f'{r["form"]:<26}{r["table_bytes"] / 1e6:>9.2f} MB'
    f'{r["dense_bytes"] / 1e6:>9.2f} MB{r["bits_per_byte"]:>11.4f}'
    f'{r["lost"]:>+10.5f}'
    + (f'{"":>9}' if error is None else f'{error:>9.5f}')
    + (f'{r["recall"]:>8.4f}' if 'recall' in r else '')
  )


def summarize(records: list[dict]) -> None:
  for r in records:
    if (aim := AIMS.get(r['form'])) is not None:
      print(f'{r["form"]}: {verdict(r)} (aim: at most {aim:+.4f})')


def verdict(record: dict) -> str:
  """Whether a form meets its aim, by two standard errors either way."""
  aim, lost = AIMS[record['form']], record['lost']
  doubt = 2 * (record['lost_stderr'] or 0.0)
  if lost + doubt <= aim:
    return 'met'
  return 'missed' if lost - doubt > aim else 'met or not, within the error'
