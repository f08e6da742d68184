# SPDX-License-Identifier: Apache-2.0
"""Memory layers: scores, addresses, bags of rows, tables over devices."""
