# SPDX-License-Identifier: Apache-2.0
"""Trains a language model: `python train.py --help`."""

import sys

from jaxsparse.cli import command

if __name__ == '__main__':
  command.main(['train', *sys.argv[1:]])
