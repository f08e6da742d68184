# SPDX-License-Identifier: Apache-2.0
"""Attention as modules: dense, composed and sparse, with their caches."""
