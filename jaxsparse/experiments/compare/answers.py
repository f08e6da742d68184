# SPDX-License-Identifier: Apache-2.0
"""What trained models say when a comparison asks them."""

from typing import Any

from jaxsparse.analysis import cost
from jaxsparse.config import Config
from jaxsparse.data import facts
from jaxsparse.data.facts import People
from jaxsparse.data.tokenizer import Tokenizer
from jaxsparse.experiments.compare import recall, results, retrieval
from jaxsparse.experiments.compare.planned import Run
from jaxsparse.experiments.compare.results import Result
from jaxsparse.run import adapter_files, start
from jaxsparse.run.progress import Reporter
from jaxsparse.training import start_from


def people_of(run: Run) -> People:
  """Whose facts a run learns; they have none of the names that it knows."""
  if run.known is None:
    return facts.make_people(run.people, run.seed)
  return facts.make_people(run.people, run.seed, beside=_old_people(run))


def _old_people(run: Run) -> People:
  assert run.known is not None
  return facts.make_people(run.known.people, run.seed)


def ask(
  run: Run, config: Config, params: Any, tokens: Tokenizer, reporter: Reporter
) -> Result:
  """What the model has of generated text; nothing of other text.

  Args:
    run: that has ended.
    config: of it, with its vocabulary.
    params: of the model.
    tokens: its tokenizer.
    reporter: gets a sentence about the answers.
  """
  forward = recall.model_forward(config.model, params)
  if run.people:
    people = people_of(run)
    recalled = recall.measure(forward, tokens, people)
    reporter.say(
      f'{recalled.share:.1%} of {len(people.names) * len(facts.ATTRIBUTES):,}'
      f' facts recalled, {recalled.bits:,.0f} of {people.bits:,.0f} bits'
    )
    found = results.describe_recall(config, people, recalled)
    if run.known:
      before = _before(run, config, tokens, reporter)
      found |= before | _after(run, config, forward, tokens)
      reporter.say(
        f'{found["old_recall_before"]:.1%} of the old facts recalled before, '
        f'{found["old_recall"]:.1%} after'
      )
    return found
  if run.needles:
    needles = retrieval.measure(forward, tokens, run.needles, run.seed)
    reporter.say(
      f'{needles.share:.1%} of {needles.num_questions:,} needles found'
    )
    return results.describe_retrieval(needles)
  return {}


def _before(
  run: Run, config: Config, tokens: Tokenizer, reporter: Reporter
) -> Result:
  """What the base has of both texts."""
  begun_from = start.settled(config, run.folder)
  assert begun_from is not None
  base = start_from.load_params(config, begun_from, reporter.say)
  forward = recall.model_forward(config.model, base)
  old = recall.measure(forward, tokens, _old_people(run))
  new = recall.measure(forward, tokens, people_of(run))
  return dict(recall_before=new.share, old_recall_before=old.share)


def _after(
  run: Run, config: Config, forward: recall.Forward, tokens: Tokenizer
) -> Result:
  old = recall.measure(forward, tokens, _old_people(run))
  return dict(
    rate=config.optimizer.learning_rate,
    old_recall=old.share,
    num_trained=_num_trained(run, config),
  )


def _num_trained(run: Run, config: Config) -> int:
  if not config.adapter.kind:
    return cost.count_parameters(config.model).total
  folder = adapter_files.folder_of(run.folder, config.adapter.name)
  tensors, _ = adapter_files.read(folder)
  return sum(
    x.size
    for name, x in tensors.items()
    if not name.endswith(('/rows', '/old_norm'))
  )
