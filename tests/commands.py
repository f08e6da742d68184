# SPDX-License-Identifier: Apache-2.0
"""The command `jaxsparse`, in this process."""

from collections.abc import Sequence

from jaxsparse.cli import command


def exit_code(argv: Sequence[str]) -> int:
  """With which the command ends."""
  try:
    command.main(argv)
  except SystemExit as exit_:
    return exit_.code
  return 0
