# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for models of a few tokens."""

import numpy as np


class Letters:
  """A tokenizer of letters, and of a token more that may end a document."""

  def __init__(self, boundary_id=-1):
    self.boundary_id = self.begin_id = boundary_id
    self.stop_ids, self.vocab_size = (boundary_id,), 23
    self.markers = {}

  def encode(self, text, has_markers=False):
    return np.array([ord(x) - 97 for x in text], np.int32)

  def decode_bytes(self, ids):
    return bytes(97 + int(i) for i in ids if i != self.boundary_id)
