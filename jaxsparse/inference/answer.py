# SPDX-License-Identifier: Apache-2.0
"""From drawn tokens to what a job is told: its text, and when that ends."""

from typing import Any

import numpy as np

from jaxsparse.inference.jobs import Event, Finish, Job, TokenLogprob
from jaxsparse.inference.slot_results import Drawn
from jaxsparse.inference.text import TextStream


class Answer:
  """The text of one job as its tokens come.

  Args:
    job: what was asked.
    tokenizer: of the model; its `stop_ids` end an answer.
  """

  def __init__(self, job: Job, tokenizer: Any):
    self._job = job
    self._stop_ids = tokenizer.stop_ids
    self._stream = TextStream(tokenizer, job.tokens, job.stop, job.include_stop)
    self._num_tokens = 0
    self._prompt = [TokenLogprob(job.tokens[0], None)]
    # Told with the first event only.
    self._news: dict[str, Any] = {}

  def note(self, **fields: Any) -> None:
    """Fields of the first event."""
    self._news |= fields

  def score(self, drawn: Drawn, begin: int, end: int) -> None:
    """Takes the scores of the tokens that follow tokens `begin` to `end`."""
    targets = self._job.tokens[begin + 1 : end + 1]
    self._prompt += [
      self._logprob(
        token,
        drawn.prompt_logprob[i],
        drawn.prompt_top_ids[i],
        drawn.prompt_top_logprobs[i],
      )
      for i, token in enumerate(targets)
    ]

  def take(self, drawn: Drawn, slot: int) -> Event:
    """What becomes of the next token, which was drawn in a slot."""
    job, stream = self._job, self._stream
    token = int(drawn.tokens[slot])
    self._num_tokens += 1
    offset = stream.num_chars
    finish, reason = self._ending(token)
    piece = ''
    if finish is None or (job.include_stop and reason is not None):
      piece = stream.feed(token)
    if stream.stop_found is None and (
      finish or self._num_tokens == job.max_tokens
    ):
      finish = finish or 'length'
      piece += stream.finish()
    if stream.stop_found is not None:
      finish, reason = 'stop', stream.stop_found
    logprobs = None
    if job.num_logprobs is not None:
      logprobs = (
        self._logprob(
          token,
          drawn.logprob[slot],
          drawn.top_ids[slot],
          drawn.top_logprobs[slot],
        ),
      )
    return self._event(
      tokens=(token,),
      text=piece,
      offsets=(offset,),
      logprobs=logprobs,
      finish=finish,
      stop_reason=reason,
    )

  def end(self, finish: Finish, error: str = '') -> Event:
    """The last event, without a token."""
    piece = self._stream.finish() if finish == 'stop' else ''
    return self._event(text=piece, finish=finish, error=error)

  def _ending(self, token: int) -> tuple[Finish | None, int | None]:
    job = self._job
    if token in self._stop_ids and not job.sampling.ignore_eos:
      return 'stop', None
    is_enough = self._num_tokens > job.sampling.min_tokens
    if token in job.stop_token_ids and is_enough:
      return 'stop', token
    return None, None

  def _logprob(
    self,
    token: int,
    logprob: np.floating,
    top_ids: np.ndarray,
    top_logprobs: np.ndarray,
  ) -> TokenLogprob:
    k = self._job.num_logprobs or 0
    top = zip(top_ids[:k].tolist(), top_logprobs[:k].tolist(), strict=True)
    return TokenLogprob(token, float(logprob), tuple(top))

  def _event(self, **fields: Any) -> Event:
    news, self._news = self._news, {}
    if self._job.wants_prompt_logprobs and self._prompt:
      is_whole = len(self._prompt) == len(self._job.tokens)
      news['prompt_logprobs'] = tuple(self._prompt) if is_whole else None
      self._prompt = []
    return Event(job_id=self._job.id, **news, **fields)
