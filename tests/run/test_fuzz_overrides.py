# SPDX-License-Identifier: Apache-2.0
"""Random overrides end in one sentence or in a model that can be traced.

Each case sets one to three fields of a small recipe, many to odd values, and
goes through what `train.py` reads, `jaxsparse.cli.cost` and the flags of
`jaxsparse.cli.generate`, all in one process. The case's number is its seed.
"""

import dataclasses
import functools
import random

import jax
import pytest

from jaxsparse.analysis import cost as analysis
from jaxsparse.cli import cost, generate
from jaxsparse.config import Config, fields
from jaxsparse.config.errors import UserError
from jaxsparse.run import command_line
from jaxsparse.training.step import init_state

RECIPES = (
  'dense:tiny',
  'ultramem:tiny',
  'ultramem_v2:tiny',
  'peer:tiny',
  'moe:tiny',
  'dcformer:tiny',
  'sparse_attention:tiny',
)
# Of the two streams one, or half of the cases were of pictures.
PATHS = sorted(
  path
  for path in fields.paths(Config)
  if not path.startswith('multimodal.vision.stream.')
)
# Larger models are valid, too, but take long to trace.
MOST_PARAMETERS = 3_000_000
MOST_LAYERS = 8
MOST_READS = 256

WORDS = (
  'adamw', 'row_adam', 'row_adagrad', 'lazy_row_adam', 'additive', 'tucker',
  'bfloat16', 'float32', 'softmax', 'per_rank', 'per_head', 'matched',
  'release', 'dense', 'indexer', 'gated', 'merged', 'layer',
  'none', 'gelu', 'head', 'projection', 'qkv', 'post', 'linear', 'int8',
)  # fmt: skip
ODD = (
  *WORDS,
  '', ' ', '0', '1', '2', '3', '-1', '4', '7', '8', '64', '0.5', '1.5', '-0.5',
  '1e-38', '1e308', '1e400', 'nan', '-nan', 'inf', '-inf', '99999999999',
  '2147483647', '2147483648', '1000000', '-9223372036854775809', '9' * 5000,
  'None', 'true', 'False', 'yes', '0x10', '1_0', '١', 'text', 'ﬁ\u202e',
  '\ud800',
  'a\nb', 'a\0b', '~nobody/x', '%s{0}', '()', '((),)', '[]', '[[1,2]]', '{}',
  "('global',)", "('local','global')", "('sparse',)", "['local']",
  'local,global',
  "('global',)" * 2, '((0,0),(0,0))', '((0,1),)', '((1,0),)', '((1,1),(1,2))',
  '((1,2,3),)', '((-1,2),)', '(0.02,0.01)', '(nan,1)', '(1e400,1)', '(True,1)',
  '(' * 300, '[' * 3000, '1' + '0' * 400, "__import__('os')", 'lambda: 0',
  '1is 2',
  'pallas', 'cudnn', 'bytes', 'bpe', '(', '[a-z', '.*', 'gs://a/b', 'x' * 300,
)  # fmt: skip
NUMBERS = ('0', '1', '2', '4', '8', '16', '32', '-3', '100000', '3000000000')
BROKEN_PATHS = (
  '', '.', '.x', 'model', 'model.', 'model.memory', 'placements.0',
  'model.memory.placements.0', 'model.memory.nums', 'train.num_steps.x',
  'modl.num_layers', 'model.num-layers', 'm\0', '<field>', 'model\n', 'é',
  '__class__', 'model.__init__', 'model.rope_dim', 'data.lanes',
)  # fmt: skip
GENERATE = (
  'workdir', 'prompt', 'prompt_file', 'history_blocks', 'max_tokens',
  'temperature', 'top_k', 'top_p', 'seed', 'stop', 'num_samples', 'step',
  'max_tokns', 'config.model.mlp', 'workdr',
)  # fmt: skip
STRAY = ('--lr=1', '-x', 'word', '--workdi', '--', '--a\0')


@functools.cache
def fitting(path: str) -> list[str]:
  """The texts that are of the field's type."""
  holder = Config
  for part in path.split('.'):
    hint = fields.hints(holder)[part]
    holder = fields.part_of(hint)
  found = []
  for text in ODD + NUMBERS:
    try:
      value = fields.parse(text, hint)
    except ValueError:
      continue
    if not isinstance(value, str) or text in WORDS:
      found.append(text)
  return found


def draw(rng: random.Random) -> list[str]:
  """Flags of one case."""
  flags = []
  for _ in range(rng.choice((1, 1, 2, 3))):
    is_field = rng.random() < 0.9
    path = rng.choice(PATHS if is_field else BROKEN_PATHS)
    fits = is_field and rng.random() < 0.6
    value = rng.choice(fitting(path) if fits else ODD)
    flag = f'--config.{path}'
    form = rng.random()
    if form < 0.05:
      flags.append(flag)
    elif form < 0.1:
      flags += [flag, value]
    else:
      flags.append(f'{flag}={value}')
  if rng.random() < 0.03:
    flags.append(rng.choice(STRAY))
  return flags


def draw_generate(rng: random.Random) -> list[str]:
  """Flags of `generate` for one case."""
  return [
    f'--{rng.choice(GENERATE)}={rng.choice(ODD + NUMBERS)}'
    for _ in range(rng.choice((1, 2, 3)))
  ]


def result_or_sentence(function, *args):
  """What the function returns; None after one sentence."""
  try:
    return function(*args)
  except UserError as error:
    said = str(error)
    assert '\n' not in said, said
    assert '<class' not in said, said
    assert said.endswith('.'), said
    assert len(said) < 1000, said
    return None


def trace(config: Config) -> None:
  """Shapes of a training state, for a model that is small."""
  model = config.model
  if not model.vocab_size:
    model = dataclasses.replace(model, vocab_size=257)
  memory = model.memory
  is_large = (
    analysis.count_parameters(model).total > MOST_PARAMETERS
    or model.num_layers > MOST_LAYERS
    or (memory and memory.num_heads * memory.num_selected > MOST_READS)
  )
  if not is_large:
    config = dataclasses.replace(config, model=model)
    jax.eval_shape(lambda: init_state(config))


def run(seed: int) -> bool:
  """One case; whether its flags gave a config."""
  rng = random.Random(seed)
  recipe = f'--config={rng.choice(RECIPES)}'
  flags = draw(rng)
  argv = [recipe, '--workdir=w', *flags]
  try:
    read = result_or_sentence(command_line.parse_recipe, '', argv)
    if read is not None:
      result_or_sentence(trace, read[0])
    result_or_sentence(cost.main, [recipe, *flags])
    flags = draw_generate(rng)
    result_or_sentence(generate.parse_arguments, flags)
  except Exception as error:
    raise AssertionError(f'case {seed}: {recipe} {flags}') from error
  return read is not None


# Of which some are accepted.
FIRST = range(5, 20)


def num_accepted(seeds, capsys) -> int:
  """How many of the cases gave a config."""
  accepted = sum(run(seed) for seed in seeds)
  capsys.readouterr()
  return accepted


def test_overrides_end_in_a_sentence_or_a_model(capsys):
  # Both ends are come to.
  assert 1 < num_accepted(FIRST, capsys) < 12


@pytest.mark.slow
def test_2045_overrides(capsys):
  others = [seed for seed in range(2060) if seed not in FIRST]
  assert num_accepted(others, capsys) > 150
