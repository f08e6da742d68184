"""The README's figures are those of results/, clause by clause."""

import json
import pathlib

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = ' '.join((ROOT / 'README.md').read_text().split())


def load(name):
  return json.loads((ROOT / 'results' / f'{name}.json').read_text())


def by_seed(name, key, people=0):
  """Architecture -> figures of a comparison, ordered by seed."""
  found = {}
  for run in sorted(load(name)['runs'], key=lambda run: run['seed']):
    if run['people'] == people:
      found.setdefault(run['architecture'], []).append(run[key])
  return found


def seconds(name):
  """(task, contender) -> seconds."""
  return {
    (r['task'], r['contender']): r['seconds'] for r in load(name)['results']
  }


def span(values, form='.2f'):
  low, high = (format(f(values), form) for f in (min, max))
  return low if low == high else f'{low}-{high}'


def tiny():
  results = load('tiny')
  runs, others = results['runs'], results['ultramem_tiny_by_value_optimizer']
  yield three_seeds(runs['dense_tiny'])
  yield f'| `adamw` | {three_seeds(runs["ultramem_tiny"])} |'
  row_adam, lazy, adagrad = (
    three_seeds(others[n]) for n in ('row_adam', 'lazy_row_adam', 'row_adagrad')
  )
  yield f'| `row_adam`, `lazy_row_adam` | {row_adam}, {lazy} |'
  yield f'| `row_adagrad` | {adagrad} |'


def three_seeds(runs):
  runs = sorted(runs, key=lambda run: run['seed'])
  bits = [run['validation_bits_per_byte'] for run in runs]
  return f'{np.mean(bits):.3f} ({", ".join(f"{b:.3f}" for b in bits)})'


def large_tables():
  step = seconds('train_step_cpu')
  row_adam, row_adagrad, adamw = (
    step[n, '64x table'] / step[n, '1x table']
    for n in ('row_adam', 'row_adagrad', 'adamw')
  )
  yield f'{row_adam:.2f}x the time by `row_adam`, {row_adagrad:.2f}x by'
  yield f'{adamw:.2f}x by `adamw`'


def language():
  losses = by_seed('compare_cpu', 'validation_loss')
  mean = {name: np.mean(x) for name, x in losses.items()}
  change = {n: f'{x - mean["dense"]:+.3f}' for n, x in mean.items()}
  yield f'at {mean["dense"]:.3f} nats/byte, MoE {change["moe"]},'
  assert change['memory_plus'] == change['pkm']
  yield f'Memory+ and PKM {change["pkm"]}, PEER {change["peer"]},'
  yield f'UltraMem {change["ultramem"]}, UltraMemV2 {change["ultramem_v2"]}'


def recalled():
  shares = by_seed('compare_facts', 'recall', 1000)
  share = {name: f'{100 * np.mean(x):.0f}' for name, x in shares.items()}
  yield f'dense {share["dense"]} %, Memory+ {share["memory_plus"]},'
  yield f'MoE {share["moe"]}, UltraMem {share["ultramem"]},'
  yield f'PEER {share["peer"]}, UltraMemV2 {share["ultramem_v2"]}'
  v2 = [100 * x for x in shares['ultramem_v2']]
  yield f'({span(v2, ".0f")}), PKM {share["pkm"]}'


NAMES = dict(
  moe='MoE', pkm='PKM', peer='PEER', memory_plus='Memory+',
  ultramem='UltraMem', ultramem_v2='UltraMemV2',
)  # fmt: skip


def recalled_of_24000():
  shares = by_seed('compare_facts_24000', 'recall', 4000)
  mean = {name: 100 * np.mean(x) for name, x in shares.items()}
  dense = mean.pop('dense')
  yield f'dense {dense:.0f} %, ' + ', '.join(
    f'{NAMES[name]} {share:.0f} ({share / dense:.1f}x)'
    for name, share in sorted(mean.items(), key=lambda item: -item[1])
  )


def walk():
  losses = by_seed('compare_cpu_ablation', 'validation_loss')
  gains = np.subtract(losses['pkm'], losses['query_conv'])
  yield f'the walk gains {gains[0]:.3f} and {gains[1]:.3f} nats/byte'


def decoding():
  cells = load('decode_cpu')['results']

  def ratios(is_large):
    ours = [
      r
      for r in cells
      if r['contender'] == 'ultramem' and (r['batch_size'] > 64) == is_large
    ]
    yield span([r['to_dense'] for r in ours])
    for name in ('moe_ratio', 'moe_limit'):
      yield span([r[name] for r in ours], '.1f')

  to_dense, of_moe, limits = ratios(is_large=False)
  yield f"to batch 64 UltraMem takes {to_dense}x dense's time"
  yield f"MoE {of_moe}x UltraMem's (limits by bytes {limits}x)"
  to_dense, of_moe, _ = ratios(is_large=True)
  yield f'at 256 {to_dense}x and {of_moe}x.'


def attention():
  loss = by_seed('compare_attention', 'validation_loss')
  wide, *composed = (
    np.subtract(loss['control'], loss[n])
    for n in ('wide', 'query_wise', 'dcmha')
  )
  yield f'composed heads gain {span(np.ravel(composed), ".3f")} nats/byte'
  yield f'FLOPs {span(wide, ".3f")}'
  loss = by_seed('compare_sparse_attention', 'validation_loss')
  sparse, window = (
    span(np.subtract(loss['dense'], loss[n]), '.3f')
    for n in ('sparse', 'window')
  )
  yield f'is {sparse} below dense, a window {window}'
  found = {
    name: f'{100 * np.mean(x):.0f}'
    for name, x in by_seed('compare_needles', 'needles_found').items()
  }
  assert found['dense'] == '100'
  yield f'sparse {found["sparse"]} %, a window {found["window"]}'


def attention_speed():
  time = seconds('attention_cpu')
  ratios = [
    time[f'forward {n}', 'dense'] / time[f'forward {n}', 'sparse']
    for n in ('4,096', '8,192', '16,384')
  ]
  yield ', '.join(f'{ratio:.1f}x' for ratio in ratios)


CLAUSES = [
  tiny, large_tables, language, recalled, recalled_of_24000, walk, decoding,
  attention, attention_speed,
]  # fmt: skip


@pytest.mark.parametrize('clauses', CLAUSES, ids=lambda f: f.__name__)
def test_figures_are_those_of_the_results(clauses):
  for clause in clauses():
    assert clause in README
