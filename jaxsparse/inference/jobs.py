# SPDX-License-Identifier: Apache-2.0
"""What a server asks of the engine, and what it gets back."""

import dataclasses
from typing import Literal

import numpy as np

from jaxsparse.inference.grammar import Grammar

Finish = Literal['stop', 'length', 'abort', 'error']

# Programs in the order of what they can do: each does what those before it do.
Form = Literal['plain', 'sorted', 'logprobs']


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobSampling:
  """How the tokens of one job are drawn; numbers are checked by who asks."""

  # Divides the logits; 0 takes the likeliest token.
  temperature: float = 1.0
  # Only the k likeliest tokens; 0 for all.
  top_k: int = 0
  # Only the likeliest tokens that are needed to reach this probability.
  top_p: float = 1.0
  # Only tokens at least this times as probable as the likeliest one.
  min_p: float = 0.0
  # Divides positive logits, and multiplies negative ones, of tokens that have
  # appeared in prompt or text.
  repetition_penalty: float = 1.0
  # Taken from the logits of tokens that the text has, once, and for each time.
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  # With the number of the token all that randomness depends on, uint32.
  seed: int = 0
  # The document does not end before so many tokens.
  min_tokens: int = 0
  # The end of a document is a token like any other.
  ignore_eos: bool = False
  # Token ids and what is added to their logits.
  logit_bias: tuple[tuple[int, float], ...] = ()

  @property
  def form(self) -> Form:
    """The least program that draws so."""
    simple = JobSampling(
      temperature=self.temperature, seed=self.seed, ignore_eos=self.ignore_eos
    )
    return 'plain' if self == simple else 'sorted'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """One prompt and one text that continues it."""

  # Unique among all jobs that the engine has.
  id: str
  # Of the prompt, at least one.
  tokens: tuple[int, ...]
  # 0 draws none: the prompt is only scored.
  max_tokens: int
  sampling: JobSampling = dataclasses.field(default_factory=JobSampling)
  # The text ends before the one that appears first, or behind it.
  stop: tuple[str, ...] = ()
  include_stop: bool = False
  # Tokens that end the text as the end of a document does.
  stop_token_ids: tuple[int, ...] = ()
  # Of each drawn token its own log-probability and the k best; None for none.
  num_logprobs: int | None = None
  # The same for the tokens of the prompt.
  wants_prompt_logprobs: bool = False
  # Only jobs with the same one share what has been read of a prompt.
  salt: str = ''
  # What the text has to match.
  grammar: Grammar | None = None
  # Of those beside the model, by its name; empty for the model alone.
  adapter: str = ''
  # What a model that sees writes about, uint8 [S, S, 3].
  picture: np.ndarray | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
  """Log-probabilities at one place, of logits as the model gives them."""

  token: int
  # None for the first token of a prompt.
  logprob: float | None
  # Ids and log-probabilities of the best tokens, best first.
  top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
  """What has become of a job since its last one; the last has `finish`."""

  job_id: str
  # Drawn tokens, the one that ends the text among them.
  tokens: tuple[int, ...] = ()
  # What is certain by now, without what may begin a stop string.
  text: str = ''
  # Of each token: characters of the text before it.
  offsets: tuple[int, ...] = ()
  # Of each token; None where none are wanted.
  logprobs: tuple[TokenLogprob, ...] | None = None
  # Of all tokens of the prompt, in the first event with tokens or the last one.
  prompt_logprobs: tuple[TokenLogprob, ...] | None = None
  finish: Finish | None = None
  # The stop string or the id of `stop_token_ids`; None for the document's end.
  stop_reason: str | int | None = None
  # A sentence where `finish` is 'error', or why it is 'abort'.
  error: str = ''
  # Of the first event. Tokens of the prompt that had been read for an earlier
  # job, and for how long the job has waited for its slot.
  num_cached: int = 0
  queue_seconds: float = 0.0


class QueueFull(Exception):
  """More waits than may wait; whoever asked may ask again."""

  def __init__(self, message: str, retry_after: int):
    super().__init__(message)
    # Seconds.
    self.retry_after = retry_after


class Unavailable(Exception):
  """The engine takes no jobs."""


class Starting(Unavailable):
  """Not yet: programs are being compiled."""


class Draining(Unavailable):
  """No more: what runs is being finished."""


class EngineDead(Unavailable):
  """Never again: the engine has failed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
  """What an engine does at a moment, and has done since its start."""

  # Jobs that draw, that wait for a slot, and whose prompts are being read.
  running: int = 0
  waiting: int = 0
  reading: int = 0
  slots: int = 0
  # Tokens in slots over the tokens for which there is room.
  cache_rows_used_ratio: float = 0.0
  # Prompt tokens of the jobs that wait.
  queue_tokens: int = 0
  programs_compiled: int = 0
  prefix_bytes: int = 0
  # Counters. Tokens of prompts, those of the prefix store among them.
  prompt_tokens: int = 0
  generation_tokens: int = 0
  # Computed after a text had ended.
  wasted_tokens: int = 0
  # Tokens that were looked up and found in the prefix store.
  prefix_cache_queries: int = 0
  prefix_cache_hits: int = 0
  # By finish.
  finished: dict[str, int] = dataclasses.field(default_factory=dict)
  # By 'requests' or 'tokens', whichever were too many.
  rejected: dict[str, int] = dataclasses.field(default_factory=dict)
  # By where the job was: 'waiting', 'reading' or 'running'.
  cancelled: dict[str, int] = dataclasses.field(default_factory=dict)
  # By program: 'see', 'prefill', 'score', 'plain', 'sorted', 'logprobs',
  # 'snapshot', 'insert'.
  steps: dict[str, int] = dataclasses.field(default_factory=dict)
