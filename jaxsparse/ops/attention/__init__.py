# SPDX-License-Identifier: Apache-2.0
"""Attention over all keys: dense, composed heads, libraries' kernels."""
