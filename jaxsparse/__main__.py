# SPDX-License-Identifier: Apache-2.0
"""`python -m jaxsparse COMMAND ...`."""

from jaxsparse.cli import command

if __name__ == '__main__':
  command.main()
