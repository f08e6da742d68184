# SPDX-License-Identifier: Apache-2.0
"""Text reaches stdout and stderr whatever they can encode."""

import io
import sys


def escape_unprintable() -> None:
  r"""Lets stdout and stderr write \u65e5 for what their encoding lacks.

  A batch job's output is often ASCII or Latin-1, and a model's sample or a
  file's name may hold any character.
  """
  for stream in (sys.stdout, sys.stderr):
    # A notebook's streams take everything.
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')
