# SPDX-License-Identifier: Apache-2.0
"""Comparisons of architectures, and measurements of speed."""
