# SPDX-License-Identifier: Apache-2.0
"""quantized_loss: bits per byte that a trained model loses in fewer bits.

One text is scored in windows by the model in each form. 'lost' is the
difference to float32, window by window, with its standard error. Bytes are
those of the tables, and of all else.

Every form is turned into numbers before it is scored, so that one program does
for all. Rows of 3 bits and of 1 bit are no format: what they would cost is
measured by rounding alone. A table of zeros is the control: it says what the
table is worth. Embedding and output are in int8 with any dense form. The form
of keys and values is scored as decoding reads them, by a cache.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.config import Config, ModelConfig
from jaxsparse.config.errors import require
from jaxsparse.data.tokenizer import load_from_workdir
from jaxsparse.evaluation.encoding import Encoded
from jaxsparse.evaluation.scorer import Score, Scorer
from jaxsparse.evaluation.tasks import TextTask
from jaxsparse.inference import quantized_leaves
from jaxsparse.inference.calibration import quantize_by_text, windows
from jaxsparse.inference.quantize import (
  bytes_by_part,
  dequantized,
  map_leaves,
  parse,
  quantize,
)
from jaxsparse.inference.text import read_file
from jaxsparse.nn.transformer import Transformer, init_cache
from jaxsparse.run import run_config

OPTIONS = dict(
  workdir='',
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

_TABLES = ('value_table', 'pre_value_table')

# Bits per byte that a form may lose.
AIMS = {'tables int8': 0.0005, 'tables int4': 0.002, 'dense int8': 0.002}


@dataclasses.dataclass(frozen=True)
class Form:
  """How numbers are stored: as `--quantize=` has it, or a fake of tables."""

  how: str = ''
  by_text: bool = False
  # Whether attention reads keys and values of 8 bits, as decoding does.
  by_cache: bool = False
  # Numbers of rows as they would be read, and bytes of a row.
  rows: Callable[[np.ndarray], tuple[np.ndarray, int]] | None = None


def three_bits(rows: np.ndarray) -> tuple[np.ndarray, int]:
  """Numbers of -3 .. 3 in units of a third of the row's largest."""
  scale = np.abs(rows).max(1, keepdims=True) / 3
  codes = np.round(rows / np.where(scale == 0, 1, scale))
  return codes * scale, math.ceil(3 * rows.shape[1] / 8) + 4


def one_bit(rows: np.ndarray) -> tuple[np.ndarray, int]:
  """Signs, times the mean size of the row's numbers."""
  scale = np.abs(rows).mean(1, keepdims=True)
  return np.where(rows < 0, -scale, scale), math.ceil(rows.shape[1] / 8) + 4


def zeros(rows: np.ndarray) -> tuple[np.ndarray, int]:
  return np.zeros_like(rows), 0


FORMS = {
  'f32': Form(),
  'tables int8': Form('tables=int8'),
  'tables int4': Form('tables=int4'),
  'tables int4 clipped': Form('tables=int4,clip_search=true'),
  'tables 3 bits': Form(rows=three_bits),
  'tables 1 bit': Form(rows=one_bit),
  'tables zero': Form(rows=zeros),
  'dense int8': Form('weights=int8'),
  'dense int4': Form('weights=int4'),
  'dense int4 GPTQ': Form('weights=int4', by_text=True),
  'dense nf4': Form('weights=nf4'),
  'both int8': Form('weights=int8,tables=int8'),
  'dense int8 and tables int4': Form('weights=int8,tables=int4'),
  'both int4': Form('weights=int4,tables=int4'),
  'KV int8': Form(by_cache=True),
}

# Logits of one call, at most.
_MOST_LOGITS = 1 << 24


def measure(options: argparse.Namespace) -> Iterator[dict]:
  """Records of all forms, that of float32 first.

  Raises:
    UserError: an option has no sense, or a file can't be read.
  """
  require(bool(options.workdir), '--workdir must name a trained model.')
  for name, least in (('bytes', 1), ('window', 0)):
    value = getattr(options, name)
    require(value >= least, f'{name} must be at least {least}, got {value}.')
  names = [n for n in options.forms.split(',') if n] or list(FORMS)
  for name in names:
    require(name in FORMS, f'forms must be of {list(FORMS)}, got {name!r}.')
  config = run_config.read(options.workdir)
  tokenizer = load_from_workdir(options.workdir)
  model = config.model.with_vocabulary(tokenizer.vocab_size)
  config = dataclasses.replace(config, model=model)
  text, calibration = _texts(options, config, names)
  _, params = quantized_leaves.load_params(options.workdir)
  window = options.window or config.data.seq_len
  sequences = _sequences(tokenizer, calibration, window)
  task = TextTask('text', [text], window=window)
  first = None
  for name in ['f32', *names]:
    form = FORMS[name]
    is_of_tables = form.rows is not None or 'tables' in form.how
    if (name == 'f32' and first) or (is_of_tables and not _has_tables(params)):
      continue
    numbers, sizes = applied(form, model, params, sequences)
    scorer = Scorer(model, numbers, tokenizer, window)
    encodings = task.encode(scorer)
    if form.by_cache:
      scores = _scores_by_cache(model, numbers, encodings.sequences)
    else:
      scores = scorer.scores(encodings.sequences)
    metric = task.measure(encodings, scores, tokenizer)['bits_per_byte']
    first = first or metric
    lost = metric.minus(first)
    yield dict(
      form=name,
      windows=len(scores),
      text_bytes=len(text.encode()),
      **sizes,
      bits_per_byte=metric.value,
      stderr=metric.error,
      lost=lost.value,
      lost_stderr=lost.error,
    )


def applied(
  form: Form, config: ModelConfig, params: dict, sequences: np.ndarray
) -> tuple[dict, dict[str, int]]:
  """The model's numbers in a form, and the bytes of its two parts."""
  table_bytes = 0
  if form.rows is not None:
    of_rows = form.rows

    def on_leaf(path, x):
      nonlocal table_bytes
      if path[-1] not in _TABLES:
        return x
      numbers, row_bytes = of_rows(np.asarray(x))
      table_bytes += len(x) * row_bytes
      return numbers

    numbers = map_leaves(on_leaf, params)
    parts = bytes_by_part(params) | dict(tables=table_bytes)
  else:
    how = parse(form.how)
    if form.by_text:
      stored = quantize_by_text(config, params, how, sequences)
    else:
      stored = quantize(config, params, how)
    numbers, parts = dequantized(stored), bytes_by_part(stored)
  table_bytes = parts.pop('tables', 0)
  return numbers, dict(table_bytes=table_bytes, dense_bytes=sum(parts.values()))


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
  cache = init_cache(config, *fed.shape)
  inputs = fed, at, jnp.ones_like(fed), cache
  logits, _, _ = Transformer(config).apply({'params': params}, *inputs)
  log_probs = jax.nn.log_softmax(logits)
  of_next = jnp.take_along_axis(log_probs, of_next, axis=-1)[..., 0]
  is_scored = at >= fed.shape[1] - counts[:, None]
  return jnp.where(is_scored, of_next, 0).sum(1)


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
      f'{"lost":>10}{"+-":>9}'
    )
  error = r['lost_stderr']
  print(
    f'{r["form"]:<26}{r["table_bytes"] / 1e6:>9.2f} MB'
    f'{r["dense_bytes"] / 1e6:>9.2f} MB{r["bits_per_byte"]:>11.4f}'
    f'{r["lost"]:>+10.5f}' + ('' if error is None else f'{error:>9.5f}')
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
