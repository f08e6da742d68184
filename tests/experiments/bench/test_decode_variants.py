# SPDX-License-Identifier: Apache-2.0
"""Changes of a decode step, each alone: what is turned off, when, and how long
it goes on."""

import argparse
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

from jaxsparse.config.errors import UserError
from jaxsparse.experiments.bench import (
  decode,
  decode_cell,
  decode_models,
  decode_variants,
  gpu,
  switches,
)
from jaxsparse.experiments.bench.decode_variants import VARIANTS
from jaxsparse.ops import top_k

TOY = gpu._TOY[decode_variants]


def options(**changes):
  return argparse.Namespace(**decode_variants.OPTIONS | TOY | changes)


class FakeCell:
  """Takes no time, and writes down how it was made."""

  made: ClassVar[list[dict]] = []

  def __init__(self, models, params, options, batch_size, lowered=None):
    self.lowered = dict.fromkeys(models, 'lowered')
    self.models = models
    made = dict(vars(options), params=params, lowered=lowered)
    made |= dict(
      batch_size=batch_size,
      keeps_graphs=top_k.KEEPS_GRAPHS,
      is_off=[
        name
        for name, kernel in switches.KERNELS.items()
        if hasattr(kernel.unsupported_reason, 'return_value')
      ],
    )
    FakeCell.made.append(made)
    if 'cublaslt' in options.compiler_options:
      raise RuntimeError('no such option\nand more')

  def contenders(self, routing):
    return dict.fromkeys(self.models)

  def records(self, task, seconds):
    # Of a step, where a call has two.
    return [
      dict(task=task, contender=n, seconds=seconds[n] / 2) for n in seconds
    ]


@pytest.fixture
def made(monkeypatch):
  """What cells were made with; two models have numbers for parameters."""
  FakeCell.made = []
  models = dict(dense='dense', ultramem='ultramem')
  fakes = {
    decode_models: dict(
      make_models=lambda *_: models,
      draw_params=lambda model: dict(of=f'plain {model}'),
    ),
    decode_variants: dict(
      Cell=FakeCell,
      # It takes parameters out of what it is given.
      fold_for_decode=lambda model, params: dict(
        of=params.pop('of').replace('plain', 'folded')
      ),
    ),
    decode_variants.decode: dict(fits=lambda *_: True),
    decode_variants.measuring: dict(
      take_turns=lambda contenders, rounds: {
        key: 1.0 if key[0] == 'as_it_is' else 2.0 for key in contenders
      }
    ),
    jax: dict(clear_caches=lambda: None),
  }
  for module, changes in fakes.items():
    for name, fake in changes.items():
      monkeypatch.setattr(module, name, fake)
  return FakeCell.made


def test_every_variant_changes_what_it_says(made):
  rows = list(decode_variants.measure(options(autotune='')))
  base, *changed = made
  assert base['params']['dense'] == dict(of='folded dense')
  assert base['keeps_graphs']
  assert not base['is_off']
  of = dict(zip(VARIANTS, changed, strict=True))
  for name, variant in VARIANTS.items():
    cell = of[name]
    kind = 'folded' if variant.is_folded else 'plain'
    assert cell['params']['dense'] == dict(of=f'{kind} dense')
    assert cell['keeps_graphs'] != variant.cuts_graphs
    assert cell['is_off'] == list(variant.without)
    # Compiled anew, and not traced.
    is_flag = name in ('pdl', 'no_split_k', 'cublaslt', 'while')
    assert (cell['lowered'] is not None) == is_flag
  assert of['as_it_was']['least_rows'] == of['one_row']['least_rows'] == 1
  assert of['two_rows']['least_rows'] == 2
  assert of['plain']['least_rows'] == 0
  failed = [row for row in rows if 'error' in row]
  assert [row['variant'] for row in failed] == ['cublaslt']
  assert failed[0]['error'] == 'RuntimeError: no such option'
  # Of both models: the variant beside the step as it is in the same rounds.
  assert len(rows) == 1 + 4 * (len(VARIANTS) - 1)
  assert [row['to_as_it_is'] for row in rows[:4]] == [1.0, 1.0, 2.0, 2.0]
  assert top_k.KEEPS_GRAPHS


def test_rows_are_changed_at_batch_1_alone(made):
  names = 'one_row,two_rows,pdl'
  rows = list(decode_variants.measure(options(batches='2', variants=names)))
  assert {row['beside'] for row in rows} == {'pdl'}


def test_none_is_begun_when_minutes_are_over(made, monkeypatch, capsys):
  now = iter([0.0, 0.0, 1.0, 61.0, 62.0])
  clock = types.SimpleNamespace(monotonic=lambda: next(now))
  monkeypatch.setattr(decode_variants, 'time', clock)
  asked = options(variants='pdl,plain', batches='2,4', minutes=1.0)
  rows = list(decode_variants.measure(asked))
  assert {row['beside'] for row in rows} == {'pdl'}
  printed = capsys.readouterr().out
  assert 'batch 2, plain: left out, the minutes are over' in printed
  assert 'batch 4: left out, the minutes are over' in printed


def test_only_steps_as_they_are_keep_what_a_gpu_has_tuned(made, tmp_path):
  folder = tmp_path / 'tuned'
  asked = options(variants='pdl,plain', autotune=str(folder))
  list(decode_variants.measure(asked))
  assert [cell['autotune'] for cell in made] == [str(folder), '', '']
  assert folder.is_dir()


def test_unknown_variants_are_refused(made):
  with pytest.raises(UserError, match='variants must be some of as_it_was'):
    list(decode_variants.measure(options(variants='as_it_was,none')))


def test_xla_takes_the_options_of_all():
  lowered = jax.jit(lambda: 0).lower()
  for variant in VARIANTS.values():
    given = decode_cell.compiler_options(variant.compiler_options)
    lowered.compile(compiler_options=given)


def test_options_of_the_compiler_may_be_lists():
  text = 'xla_a=true,xla_b=FUSION,CUBLAS,xla_c=2'
  assert decode_cell.compiler_options(text) == dict(
    xla_a=True, xla_b='FUSION,CUBLAS', xla_c='2'
  )
  assert decode_cell.compiler_options('') == {}
  with pytest.raises(UserError, match='compiler_options must be like'):
    decode.check(options(compiler_options='xla_a'))


def test_selections_may_cut_a_graph():
  """The lowering for CUDA asks for XLA's selection then."""
  rows = jnp.zeros((2, 8))

  def text():
    traced = jax.jit(lambda x: top_k.top_m(x, 2)).trace(rows)
    return traced.lower(lowering_platforms=('cuda',)).as_text()

  assert 'top_k' not in text()
  with switches.without(cuts_graphs=True):
    assert 'top_k' in text()
