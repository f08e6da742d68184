# SPDX-License-Identifier: Apache-2.0
"""What a recipe costs: `python -m jaxsparse cost --config=configs/NAME.py`.

Fields are overridden as in training: `--config.model.num_kv_heads=2`.
"""

import dataclasses

from jaxsparse.analysis import cost, multimodal_cost, run_cost
from jaxsparse.config import Config
from jaxsparse.config.errors import UserError, require, shown
from jaxsparse.run import command_line, overrides

# Rows of the embedding where the recipe leaves them to the tokenizer.
_BYTES = 257


def main(arguments: list[str]) -> None:
  """Prints parameters, FLOPs and bytes.

  Raises:
    UserError: a flag, the recipe or one of its fields is wrong.
  """
  parser = command_line.Parser(prog='jaxsparse cost', has_fields=True)
  parser.add_argument('--config', required=True, help='a file in configs/')
  parser.add_argument(
    '--batch_sizes', default='1,16,64,256', help='of decode steps'
  )
  parser.add_argument(
    '--context', type=int, default=2048, help='tokens in the cache'
  )
  options = parser.parse_args(overrides.split(arguments)[1])
  require(
    options.context >= 0,
    f'--context must not be negative, got {options.context}.',
  )
  batch_sizes = _numbers(options.batch_sizes)
  config = command_line.read_recipe(options.config, arguments)
  print('\n'.join(describe(config, batch_sizes, options.context)))


def describe(config: Config, batch_sizes: list[int], context: int) -> list[str]:
  """The lines that `main` prints."""
  model = config.model
  vocabulary = ''
  if not model.vocab_size:
    model = dataclasses.replace(model, vocab_size=_BYTES)
    vocabulary = f' (vocabulary of the bytes, {_BYTES})'
  length = config.data.seq_len
  if config.multimodal:
    return _of_pairs(dataclasses.replace(config, model=model), vocabulary)
  count = cost.count_parameters(model)
  forward = cost.forward_flops(model, length)
  step = config.data.batch_size * length
  lines = _parameters(count, vocabulary)
  lines += [
    f'as papers count: {count.published:,}, active {count.active:,}, '
    f'{cost.paper_flops(model) / 1e9:.4g} GFLOPs a token forward',
    f'every product: {forward / 1e9:.4g} GFLOPs a token forward at '
    f'{length:,} positions; a train step of {step:,} tokens '
    f'{3 * forward * step / 1e12:.4g} TFLOPs',
    f'bytes that a decode step reads at least, 2 a value, context {context:,}:',
    f'{"batch":>8}{"weights":>10}{"experts":>10}{"values":>10}{"cache":>10}'
    f'{"total":>10}  GB',
  ]
  for batch_size in batch_sizes:
    read = cost.decode_bytes(model, batch_size, context)
    parts = (read.weights, read.experts, read.values, read.cache, read.total)
    lines.append(
      f'{batch_size:>8,}' + ''.join(f'{part / 1e9:>10.4g}' for part in parts)
    )
  return lines


def _numbers(text: str) -> list[int]:
  try:
    numbers = [int(part) for part in text.split(',')]
  except ValueError:
    numbers = []
  if not numbers or min(numbers) < 1:
    raise UserError(
      f'--batch_sizes must be positive numbers with commas between, got '
      f'{shown(text)}.'
    )
  return numbers


def _of_pairs(config: Config, vocabulary: str) -> list[str]:
  """Of a recipe of pictures with captions: both streams and what fuses them."""
  assert config.multimodal is not None
  of_image = multimodal_cost.vision_flops(config.multimodal.vision)
  of_pair = run_cost.forward_flops(config)
  step = 3 * of_pair * config.data.batch_size
  return [
    *_parameters(run_cost.parameters(config), vocabulary),
    f'every product: {of_pair / 1e9:.4g} GFLOPs a pair forward at '
    f'{config.data.seq_len:,} tokens, {of_image / 1e9:.4g} of them a picture; '
    f'a train step of {config.data.batch_size:,} pairs {step / 1e12:.4g} '
    'TFLOPs',
  ]


def _parameters(count: cost.Parameters, vocabulary: str) -> list[str]:
  lines = [f'parameters  {count.total:,}{vocabulary}']
  for field in dataclasses.fields(count):
    lines.append(f'  {field.name:<15}{getattr(count, field.name):>18,}')
  return lines
