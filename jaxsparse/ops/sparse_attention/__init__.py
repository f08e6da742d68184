# SPDX-License-Identifier: Apache-2.0
"""Attention over chosen key blocks, and its caches."""
