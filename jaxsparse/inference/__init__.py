# SPDX-License-Identifier: Apache-2.0
"""Caches, decoding, sampling."""
