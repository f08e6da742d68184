# SPDX-License-Identifier: Apache-2.0
"""Comparisons of architectures at equal budget."""
