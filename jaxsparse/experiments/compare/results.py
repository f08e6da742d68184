# SPDX-License-Identifier: Apache-2.0
"""What is kept of a run: its sizes, losses and speed, and what it recalls."""

import hashlib
import pathlib
from typing import Any

import jax
import numpy as np

from jaxsparse.analysis import budget, cost, usage
from jaxsparse.config import Config
from jaxsparse.data import facts, pipeline
from jaxsparse.data.pieces import Corpus
from jaxsparse.data.tokenizer import Tokenizer
from jaxsparse.experiments.compare.recall import Recall
from jaxsparse.experiments.compare.retrieval import Retrieval
from jaxsparse.run import metrics
from jaxsparse.training.evaluation import Validation

Result = dict[str, Any]

# Points that are kept of a run's loss curve.
_CURVE_POINTS = 100


def describe(
  config: Config, folder: pathlib.Path, validation: Validation
) -> Result:
  """Sizes, losses and speed.

  Args:
    config: of the run, with its vocabulary.
    folder: the run's workdir, for its metrics.
    validation: of the pass at the end.
  """
  return dict(
    device=f'{jax.device_count()} x {jax.devices()[0].device_kind}',
    jax=jax.__version__,
    **_sizes(config),
    **_curves(folder, validation),
  )


def first_batches(config: Config, corpus: Corpus, tokens: Tokenizer) -> str:
  """A hash of what the stream of batches hangs on, and of its beginning."""
  identity = (
    corpus.key,
    config.train.seed,
    config.data.lanes,
    config.data.batch_size,
    config.data.seq_len,
  )
  digest = hashlib.sha256(repr(identity).encode())
  iterator = pipeline.train_iterator(
    config.data, corpus, tokens, config.train.seed
  )
  for _ in range(2):
    batch = next(iterator)
    for name in sorted(batch):
      digest.update(np.ascontiguousarray(batch[name]).tobytes())
  iterator.close()
  return digest.hexdigest()[:16]


def _sizes(config: Config) -> Result:
  parameters = cost.count_parameters(config.model)
  return dict(
    sizes=budget.describe(config.model),
    parameters=parameters.published,
    parameters_with_embeddings=parameters.total,
    flops_per_token=cost.forward_flops(config.model, config.data.seq_len),
    num_steps=config.train.num_steps,
    num_tokens=(
      config.train.num_steps * config.data.batch_size * config.data.seq_len
    ),
  )


def _curves(folder: pathlib.Path, validation: Validation) -> Result:
  rows = [r for r in metrics.read_rows(folder) if r.get('loss') is not None]
  speeds = [r['tokens_per_second'] for r in rows if 'tokens_per_second' in r]
  steps = np.array([r['step'] for r in rows])
  losses = np.array([r['loss'] for r in rows])
  # Single batches are noisy: a point is the mean of those around it.
  groups = np.array_split(np.arange(len(rows)), min(len(rows), _CURVE_POINTS))
  # The last tenth of the rows.
  last = slice(-max(1, len(rows) // 10), None)
  kept = [
    x
    for r in rows[last]
    for name, x in r.items()
    if name.endswith('kept_share')
  ]
  usage_fraction = {
    layer: float(usage.measure(reads).usage_fraction)
    for layer, reads in validation.slot_counts.items()
  }
  return dict(
    training_loss=float(np.mean(losses[last])),
    validation_loss=validation.loss,
    bits_per_byte=validation.bits_per_byte,
    tokens_per_second=float(np.median(speeds)),
    usage_fraction=usage_fraction,
    # Of blocks that sparse attention may keep, the mean over its layers.
    **(dict(kept_share=float(np.mean(kept))) if kept else {}),
    curve=[
      [float(np.mean(steps[group])), float(np.mean(losses[group]))]
      for group in groups
    ],
  )


def describe_recall(
  config: Config, people: facts.People, recalled: Recall
) -> Result:
  """Facts and bits, and what they cost in parameters and exposures."""
  number = len(people.names)
  num_tokens = (
    config.train.num_steps * config.data.batch_size * config.data.seq_len
  )
  total = cost.count_parameters(config.model).total
  return dict(
    num_facts=number * len(facts.ATTRIBUTES),
    # How often training saw a fact of a person who is not famous.
    exposures=facts.exposures(num_tokens, number),
    recall=recalled.share,
    recall_by_attribute=recalled.share_by_attribute,
    facts_recalled=recalled.facts,
    bits=recalled.bits,
    bits_of_all=people.bits,
    # Of all parameters, embeddings too: they may hold facts.
    bits_per_parameter=recalled.bits / total,
  )


def describe_retrieval(found: Retrieval) -> Result:
  """Needles found, and where in the haystack."""
  return dict(
    needles_found=found.share,
    needles_found_by_depth=list(found.share_by_depth),
    num_questions=found.num_questions,
  )
