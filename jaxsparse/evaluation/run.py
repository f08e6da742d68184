# SPDX-License-Identifier: Apache-2.0
"""One task by one model: what is left of it is scored, then measured."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from jaxsparse.evaluation import metrics
from jaxsparse.evaluation.metrics import Metric
from jaxsparse.evaluation.scorer import Score, Scorer
from jaxsparse.evaluation.store import Store
from jaxsparse.evaluation.tasks import Encodings, Task
from jaxsparse.run.progress import Reporter

# Between two lines where there is no terminal, and between writes of items.
_SECONDS, _WRITE_SECONDS = 30.0, 1.0


@dataclasses.dataclass(frozen=True)
class Result:
  """What one model makes of one task."""

  task: str
  num_items: int
  # Items of whose contexts something was cut off.
  num_cut: int
  metrics: dict[str, Metric]

  def to_json(self) -> dict:
    return dict(
      task=self.task,
      num_items=self.num_items,
      num_cut=self.num_cut,
      metrics=metrics.to_json(self.metrics),
    )


def evaluate(
  task: Task,
  scorer: Scorer,
  store: Store,
  reporter: Reporter,
) -> Result:
  """Scores what no earlier evaluation with these settings has, and measures.

  Args:
    task: what is asked.
    scorer: the model, under the mesh in use.
    store: keeps every score, and the result.
    reporter: shows how far it is.

  Raises:
    UserError: something of the task can't be scored, or nothing be written.
  """
  encodings = task.encode(scorer)
  count = len(encodings.sequences)
  known = store.scores(count)
  if known:
    reporter.say(
      f'{task.name}: {len(known):,} of {count:,} scores are taken from '
      f'{str(store.items)!r}.'
    )
  left = [i for i in range(count) if i not in known]
  if left:
    known |= _score(task.name, scorer, encodings, left, store, reporter)
  scores = [known[i] for i in range(count)]
  found = task.measure(encodings, scores, scorer.tokenizer)
  result = Result(task.name, encodings.num_items, encodings.num_cut, found)
  store.finish(result.to_json())
  return result


def _score(
  name: str,
  scorer: Scorer,
  encodings: Encodings,
  left: Sequence[int],
  store: Store,
  reporter: Reporter,
) -> dict[int, Score]:
  """Scores of the sequences that are left, by their numbers."""
  sequences = [encodings.sequences[i] for i in left]
  total = sum(s.length for s in sequences)
  found: dict[int, Score] = {}
  rows: list[dict[str, Any]] = []
  num_tokens, start = 0, time.monotonic()
  written = logged = start
  with store.open() as writer, reporter.steps(0, len(left), name):
    for done, (i, score) in enumerate(scorer.in_batches(sequences), 1):
      number = left[i]
      found[number] = score
      num_tokens += sequences[i].length
      rows.append(_row(number, encodings, score))
      now = time.monotonic()
      if now - written < _WRITE_SECONDS and done < len(left):
        continue
      writer.write(rows)
      rows, written = [], now
      rate = num_tokens / max(now - start, 1e-6)
      is_logged = now - logged >= _SECONDS or done == len(left)
      logged = now if is_logged else logged
      reporter.show(
        done,
        len(left),
        {'tokens_per_second': rate},
        (total - num_tokens) / rate,
        is_logged=is_logged,
      )
  return found


def _row(number: int, encodings: Encodings, score: Score) -> dict:
  sequence = encodings.sequences[number]
  return dict(
    number=number,
    **encodings.labels[number],
    logprob=score.logprob,
    is_greedy=score.is_greedy,
    num_tokens=sequence.num_targets,
    num_cut=sequence.num_cut,
  )
