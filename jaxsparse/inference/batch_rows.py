# SPDX-License-Identifier: Apache-2.0
"""How many rows a decode program has: not always one for each sequence."""

from jaxsparse import mesh

# Rows on each device, at least. For one row XLA makes a GPU's products of
# multiplications and sums: it writes what it will add up, or lays all weights
# out anew. A CPU takes 1.4 to 2 times as long for two rows as for one.
_LEAST = dict(gpu=2)


def padded(num_sequences: int) -> int:
  """Rows of the decode program for so many sequences, on the mesh in use."""
  least = _LEAST.get(mesh.platform(), 1)
  if least == 1:
    return num_sequences
  return max(num_sequences, least * mesh.num_token_shards())
