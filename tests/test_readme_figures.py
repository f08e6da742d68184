# SPDX-License-Identifier: Apache-2.0
"""The README's figures are those of results/, clause by clause."""

import numpy as np
import pytest
from documents import PAGES, generator

README = ' '.join(PAGES['README.md'].split())
results = generator().results_tables
results_decode = generator().results_speed.results_decode
results_quantized = generator().results_speed.results_quantized


def by_seed(name, key, people=0):
  return results.by_seed(name, key, people)


def recalled():
  shares = by_seed('compare_facts_24000', 'recall', 4000)
  share = {name: f'{100 * np.mean(x):.0f} %' for name, x in shares.items()}
  yield f'dense {share["dense"]}, Memory+ {share["memory_plus"]},'
  yield f'UltraMem {share["ultramem"]}, MoE {share["moe"]} |'


def decoding():
  cell = next(
    cell
    for cell in results_decode.h200_cells()
    if (cell['task'], cell['contender'])
    == ('KV /8, uniform, batch 64', 'ultramem')
  )
  yield f"UltraMem {cell['to_dense']:.2f}x dense's time,"
  yield f"MoE {cell['moe_ratio']:.1f}x UltraMem's"


def large_tables():
  step = results.seconds('train_step_cpu')
  row_adam, adamw = (
    step[n, '64x table'] / step[n, '1x table'] for n in ('row_adam', 'adamw')
  )
  yield f'`row_adam` {row_adam:.2f}x the time, `adamw` {adamw:.2f}x'


def heads():
  loss = by_seed('compare_attention', 'validation_loss')
  wide, *composed = (
    np.subtract(loss['control'], loss[n])
    for n in ('wide', 'query_wise', 'dcmha')
  )
  composed, wide = (
    f'{np.min(x):.3f}-{np.max(x):.3f}' for x in (composed, wide)
  )
  yield f'{composed}; a wider MLP of equal FLOPs {wide}'


def language():
  losses = by_seed('compare_cpu', 'validation_loss')
  mean = {name: np.mean(x) for name, x in losses.items()}
  change = {n: f'{x - mean["dense"]:+.3f}' for n, x in mean.items()}
  yield f'MoE {change["moe"]}, Memory+ {change["memory_plus"]},'
  yield f'UltraMem {change["ultramem"]} |'


def four_bits():
  losses = results_quantized.losses('`ultramem:tiny`')
  row = losses['tables int4']
  share = row['table_bytes'] / losses['f32']['table_bytes']
  yield f'{share:.2f} of the bytes, {row["lost"]:+.4f} bits per byte |'


CLAUSES = [recalled, decoding, large_tables, heads, language, four_bits]


@pytest.mark.parametrize('clauses', CLAUSES, ids=lambda f: f.__name__)
def test_figures_are_those_of_the_results(clauses):
  for clause in clauses():
    assert clause in README
