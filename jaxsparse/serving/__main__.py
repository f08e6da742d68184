# SPDX-License-Identifier: Apache-2.0
"""`python -m jaxsparse.serving`, which is `model-server`."""

import sys

from jaxsparse.run.command_line import user_errors_end_in_a_sentence
from jaxsparse.serving import command

if __name__ == '__main__':
  with user_errors_end_in_a_sentence():
    command.main(sys.argv[1:])
