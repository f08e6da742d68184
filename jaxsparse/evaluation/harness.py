# SPDX-License-Identifier: Apache-2.0
"""The scorer as a model of lm-evaluation-harness, called 'jaxsparse'.

`import jaxsparse.evaluation.harness` registers it; then `--model jaxsparse` and
`model_args='workdir=runs/x'` are known to `lm_eval.simple_evaluate`. Needs the
extra `eval`, which brings no torch.
"""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from jaxsparse.config.errors import UserError
from jaxsparse.evaluation import models
from jaxsparse.evaluation.scorer import BATCH_TOKENS, Scorer
from jaxsparse.inference.sampling import Sampling
from jaxsparse.inference.text import Request

try:
  import lm_eval
  from lm_eval.api.model import LM
  from lm_eval.api.registry import register_model
  from lm_eval.tasks import TaskManager
  from lm_eval.utils import make_table
except ImportError as error:
  raise UserError(
    f'--harness needs {(error.name or "lm_eval").partition(".")[0]}, which is '
    "not installed: pip install 'jaxsparse[eval]'."
  ) from error

# Tokens of a text where a task says nothing.
_MOST_TOKENS = 256


@register_model('jaxsparse')
class Jaxsparse(LM):
  """Answers the harness's three questions.

  Contexts begin with the tokenizer's begin token, and pairs and windows are
  encoded as `lm_eval.api.model.TemplateLM` does.
  """

  def __init__(
    self,
    workdir: str = '',
    step: int | str | None = None,
    max_length: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    devices: int = 1,
    scorer: Scorer | None = None,
    **others: Any,
  ):
    """Loads a workdir's model, or takes a scorer that is there.

    Args:
      workdir: of a training run; not with `scorer`.
      step: which checkpoint, or 'best'.
      max_length: tokens that the model reads at most; as in training.
      batch_tokens: of a batch.
      devices: over which batches are split; texts are written by one.
      scorer: of a model that is loaded, under the mesh in use.
      others: what the harness gives to all models, such as `batch_size`.
    """
    super().__init__()
    del others
    self._scope = contextlib.ExitStack()
    if scorer is None:
      options = models.Options(
        step=step, max_length=max_length, batch_tokens=int(batch_tokens),
        devices=int(devices),
      )  # fmt: skip
      scorer = self._scope.enter_context(
        models.load(workdir, options, _say)
      ).scorer
    self._scorer = scorer

  @property
  def tokenizer_name(self) -> str:
    return 'jaxsparse'

  def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
    pairs = [request.args for request in requests]
    return [tuple(s) for s in self._scorer.loglikelihoods(pairs)]

  def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
    return self._scorer.rolling([request.args[0] for request in requests])

  def generate_until(self, requests: Sequence[Any]) -> list[str]:
    return self._scorer.generate([_to_request(*r.args) for r in requests])


def evaluate(
  scorer: Scorer,
  tasks: Sequence[str],
  include_path: str | None = None,
  limit: int | None = None,
) -> dict[str, Any]:
  """Results of the harness's tasks, as it returns them.

  Args:
    scorer: the model, under the mesh in use.
    tasks: their names.
    include_path: folder with tasks of one's own.
    limit: first questions of each task.

  Raises:
    UserError: there is no such task.
  """
  manager = TaskManager(include_path=include_path)
  unknown = [name for name in tasks if not manager.match_tasks([name])]
  if unknown:
    raise UserError(
      f'lm-evaluation-harness has no task {unknown[0]!r}: see its list, or '
      'give --include-path with a folder of your own.'
    )
  return lm_eval.simple_evaluate(
    model=Jaxsparse(scorer=scorer),
    tasks=list(tasks),
    limit=limit,
    task_manager=manager,
  )


def table(results: dict[str, Any]) -> str:
  return make_table(results)


def _to_request(context: str, settings: dict[str, Any]) -> Request:
  """What a task asks to be written; greedily unless it draws."""
  until = settings.get('until') or []
  until = [until] if isinstance(until, str) else until
  draws = settings.get('do_sample', False)
  return Request(
    prompt=context,
    max_tokens=int(settings.get('max_gen_toks', _MOST_TOKENS)),
    stop=tuple(stop for stop in until if stop),
    sampling=Sampling(
      temperature=float(settings.get('temperature', 1.0)) if draws else 0.0,
      top_k=int(settings.get('top_k', 0)) if draws else 0,
      top_p=float(settings.get('top_p', 1.0)) if draws else 1.0,
    ),
  )


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
