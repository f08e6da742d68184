# SPDX-License-Identifier: Apache-2.0
"""What is checked and said before a run's first step."""

from jaxsparse import mesh
from jaxsparse.config import Config
from jaxsparse.config.errors import UserError
from jaxsparse.run.progress import Reporter


def tell_of_warmup(config: Config, reporter: Reporter) -> None:
  """Says if the run is too short for its warm-up."""
  asked, num_steps = config.optimizer.warmup_steps, config.train.num_steps
  if (warmup := config.optimizer.warmup_within(num_steps)) < asked:
    reporter.say(
      f'optimizer.warmup_steps = {asked} is no less than train.num_steps = '
      f'{num_steps}: the warm-up takes {warmup} steps.'
    )


def check_batch(config: Config) -> None:
  """Refuses a batch that the mesh in use can't split.

  Raises:
    UserError: as it says.
  """
  pieces = mesh.num_token_shards()
  micro = config.data.batch_size // config.optimizer.grad_accumulation
  if micro % pieces:
    raise UserError(
      'data.batch_size / optimizer.grad_accumulation must be a multiple of '
      f'mesh.data x mesh.sparse = {pieces}, got {micro}.'
    )
