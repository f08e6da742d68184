# SPDX-License-Identifier: Apache-2.0
"""The page of results about the server."""

from results_tables import load, machine, table

_WORDS = {
  'throughput': 'tokens a second at full slots, to a batch in `generate`',
  'gap': 'between tokens at full slots, to a bare decode step',
  'first': 'to the first token of an idle server, to one chunk and one step',
  'first, busy': 'to the first token at 70 % load (p95), to an idle server',
  'continuous': 'tokens a second, answers of unequal length, to batches that '
  'wait for their longest',
  'prefix': 'to the first token of a prompt that was read before, to a new one',
  'long prompt': 'between tokens (p99) while a long prompt is read, to without',
  'start': 'to a ready server, programs kept, to without',
  'memory': 'memory of the server after more requests (2,000 and 100), to after '
  'its first 100',
}


def serving():
  files = {'`ultramem:tiny`': 'serve_cpu', 'dense, 25M': 'serve_25m_cpu'}
  found = {
    name: {r['figure']: r for r in load(file)['results']}
    for name, file in files.items()
  }
  options = load('serve_cpu')['arguments']
  rows = []
  for figure, words in _WORDS.items():
    records = [of_model[figure] for of_model in found.values()]
    first = records[0]
    sign = 'at least' if first['at_least'] else 'at most'
    rows.append(
      [words]
      + [f'{r["ratio"]:.2f}x' for r in records]
      + [f'{sign} {first["aim"]}x']
    )
  tiny = found['`ultramem:tiny`']
  loops = load('serve_load_cpu')['results']
  load_rows = [
    [
      f'{r["users"]} users'
      if r['loop'] == 'closed'
      else f'{r["rate"]:.1f} a second',
      f'{r["tokens_per_second"]:,.0f}',
      *(_ms(r[key]) for key in ('first_p50', 'first_p95', 'first_p99')),
      *(_ms(r[key]) for key in ('gap_p50', 'gap_p99')),
      str(r['refused']),
    ]
    for r in loops
  ]
  return f"""# Serving on a CPU

## Beside the model without a server
`model-server` and the same model in a process of its own, in turns on the same two cores, load generator and HTTP among them:
`jaxsparse bench serve_ratios --workdir=...`; figures in `results/serve_cpu.json` and `results/serve_25m_cpu.json` ({machine('serve_cpu')}).
{options['slots']} slots, prompts of {options['prompt_tokens']} tokens, answers of {options['answer_tokens']}, chunks of {options['chunk']}. The dense model is 512 wide with 8 blocks,\ntrained for 60 steps.

{table(['figure', *found, 'aim'], rows)}

Rates are of whole answers, gaps of streams; streamed answers of `ultramem:tiny`, in an earlier run, reached 0.52x of a batch. Answers of unequal
length are exponential, a third of the longest on average. One run each: an earlier one of the dense model had 0.80x, 1.17x for the gap and 0.40x
for the start, so what is near an aim may fall on either side. Of a rate below its aim two things take the most. Prompts are read one by one
where a batch reads all of its prompts at once: eight chunks of the dense model are 160 ms, a tenth of an answer's time. And at 2 ms a step the
two cores are shared: of 2,304 streamed tokens of `ultramem:tiny`, XLA took 0.6 s of a core, the server's Python 0.6 s (0.4 s with whole answers)
and the load generator 0.4 s (0.1 s; by hand, from the times of threads in /proc).

The first token of `ultramem:tiny` comes after {_ms(tiny['first']['this'])} (aim: below 200 ms). A server of it is ready after
{tiny['start']['to']:.0f} s, and after {tiny['start']['this']:.0f} s with compiled programs kept.

## Under load
`ultramem:tiny`: first users who wait for their answers, then questions at random times, at shares of what those users reached:
`jaxsparse bench serve --workdir=... --picture=...`; figures in `results/serve_load_cpu.json`.

{table(['load', 'tokens/s', 'first p50', 'p95', 'p99', 'gap p50', 'p99', 'refused'], load_rows)}

![Latency against load](../pictures/serve_load.png)

"""


def _users(number):
  return f'{number} user' + 's' * (number > 1)


def _ms(seconds):
  return '-' if seconds is None else f'{1e3 * seconds:.0f} ms'
