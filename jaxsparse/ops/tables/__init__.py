# SPDX-License-Identifier: Apache-2.0
"""How the rows of a value table are stored."""
