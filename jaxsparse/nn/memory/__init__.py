# SPDX-License-Identifier: Apache-2.0
"""Memory layers as modules: parameters, retrieval, tables."""

from jaxsparse.nn.memory.layer import MemoryLayer as MemoryLayer
