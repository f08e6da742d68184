# SPDX-License-Identifier: Apache-2.0
"""What /metrics tells: counters of the engine, and times that clients see.

Names are those of vLLM with our prefix, so that dashboards carry over. Values
of labels come from closed sets: no request can make a series.
"""

from collections.abc import Callable, Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from jaxsparse.inference.jobs import EngineStats
from jaxsparse.serving.errors import CODES

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4

_PREFIX = 'jaxsparse'

# Upper bounds of histograms: seconds of requests, seconds of steps, tokens.
_WAITS = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_TOKENS = tuple(4**i for i in range(10))
_SLOTS = tuple(2**i for i in range(10))

# Attribute of the stats -> what it is.
_GAUGES = {
  'slots': 'Sequences that decode at once.',
  'cache_rows_used_ratio': 'Tokens in slots over those that fit.',
  'queue_tokens': 'Prompt tokens of the jobs that wait.',
  'programs_compiled': 'Programs that the engine has.',
  'prefix_bytes': 'Of snapshots in the prefix store.',
}
_COUNTERS = {
  'prompt_tokens': 'Tokens of prompts.',
  'generation_tokens': 'Tokens drawn.',
  'wasted_tokens': 'Tokens computed after a text had ended.',
  'prefix_cache_queries': 'Prompt tokens looked up in the prefix store.',
  'prefix_cache_hits': 'Prompt tokens found there.',
}
# Attribute -> name, label, what it is.
_LABELED = {
  'finished': ('request_success', 'finish_reason', 'Jobs that ended.'),
  'cancelled': ('requests_cancelled', 'where', 'Jobs cancelled.'),
  'steps': ('engine_steps', 'program', 'Programs run.'),
}


class Metrics:
  """The collectors of one server."""

  def __init__(self):
    self.registry = prometheus_client.CollectorRegistry()

    def histogram(name, what, buckets, labels=()):
      return prometheus_client.Histogram(
        name,
        what,
        labels,
        namespace=_PREFIX,
        buckets=buckets,
        registry=self.registry,
      )

    self.first_token = histogram(
      'time_to_first_token_seconds', 'From arrival to the first token.', _WAITS
    )
    self.inter_token = histogram(
      'inter_token_latency_seconds', 'Between two tokens of a text.', _STEPS
    )
    self.whole = histogram(
      'e2e_request_latency_seconds', 'From arrival to the last token.', _WAITS
    )
    self.prompt_tokens = histogram(
      'request_prompt_tokens', 'Tokens of a prompt.', _TOKENS
    )
    self.drawn_tokens = histogram(
      'request_generation_tokens', 'Tokens drawn for a prompt.', _TOKENS
    )
    self._engine = {
      'request_queue_time_seconds': histogram(
        'request_queue_time_seconds', 'From arrival to a slot.', _WAITS
      ),
      'batch_occupancy': histogram(
        'batch_occupancy', 'Slots that drew in a step.', _SLOTS
      ),
    }
    self._step = histogram(
      'step_seconds', 'Of one program.', _STEPS, ('program',)
    )
    self._rejected = prometheus_client.Counter(
      'requests_rejected',
      'Requests that ended in an error, by its code.',
      ('code',),
      namespace=_PREFIX,
      registry=self.registry,
    )
    for code in CODES:
      self._rejected.labels(code)

  def observe(self, name: str, value: float, label: str) -> None:
    """A figure of the engine, from its thread."""
    if name == 'step_seconds':
      self._step.labels(label).observe(value)
    elif histogram := self._engine.get(name):
      histogram.observe(value)

  def reject(self, code: str) -> None:
    self._rejected.labels(code).inc()

  def watch(
    self,
    stats: Callable[[], EngineStats],
    heartbeat_age: Callable[[], float],
    model_step: Callable[[], int],
  ) -> None:
    """Adds what the engine counts by itself."""
    self.registry.register(_Engine(stats, heartbeat_age, model_step))

  def text(self) -> bytes:
    return prometheus_client.generate_latest(self.registry)


class _Engine(prometheus_client.registry.Collector):
  """Reads the engine when it is asked."""

  def __init__(self, stats, heartbeat_age, model_step):
    self._stats, self._age = stats, heartbeat_age
    self._model_step = model_step

  def describe(self) -> list:
    return []

  def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
    stats = self._stats()

    def gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
      return GaugeMetricFamily(f'{_PREFIX}_{name}', what, value)

    yield gauge('num_requests_running', 'Jobs that draw.', stats.running)
    yield gauge('num_requests_waiting', 'Jobs without a slot.', stats.waiting)
    yield gauge(
      'num_requests_reading', 'Jobs whose prompts are read.', stats.reading
    )
    for name, what in _GAUGES.items():
      yield gauge(name, what, getattr(stats, name))
    yield gauge(
      'engine_heartbeat_age_seconds', 'Since its last step.', self._age()
    )
    yield gauge('model_step', 'Of the checkpoint.', self._model_step())
    for name, what in _COUNTERS.items():
      value = getattr(stats, name)
      yield CounterMetricFamily(f'{_PREFIX}_{name}', what, value)
    for attribute, (name, label, what) in _LABELED.items():
      family = CounterMetricFamily(f'{_PREFIX}_{name}', what, labels=[label])
      for key, value in sorted(getattr(stats, attribute).items()):
        family.add_metric([key], value)
      yield family
