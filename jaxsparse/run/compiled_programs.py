# SPDX-License-Identifier: Apache-2.0
"""Programs that XLA compiled, kept for later starts.

JAX loads native code from where they are kept: only a folder that the user
alone can write, and never one that a workdir names.
"""

import os
import pathlib
from collections.abc import Callable

import jax

from jaxsparse.config import DataConfig


def keep(
  cache_dir: str = DataConfig.cache_dir, say: Callable[[str], None] = print
) -> None:
  """Lets later starts load what XLA compiled.

  Args:
    cache_dir: of the user's own recipe. What only reads a workdir takes the
      default.
    say: gets the reason where programs are not kept.
  """
  if '://' in cache_dir:
    return
  folder = pathlib.Path(cache_dir).expanduser() / 'compiled'
  if reason := _unsafe_reason(folder):
    say(f"Compiled programs are not kept: '{folder}' {reason}.")
    jax.config.update('jax_compilation_cache_dir', None)
    return
  jax.config.update('jax_compilation_cache_dir', str(folder))
  least = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update(
    'jax_persistent_cache_min_compile_time_secs', min(least, 0.5)
  )


def _unsafe_reason(folder: pathlib.Path) -> str:
  """Why no code may be loaded from the folder, or ''; the folder is made."""
  try:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    own, parent = folder.stat(), folder.parent.stat()
    if own.st_uid != os.geteuid():
      return 'belongs to another user'
    # Who can write there could put another folder in its place.
    if parent.st_uid not in (os.geteuid(), 0) or parent.st_mode & 0o1002 == 2:
      return 'lies in a folder that other users can write'
    if own.st_mode & 0o077:
      folder.chmod(0o700)
  except OSError as error:
    return f"can't be used ({error.strerror})"
  return ''
