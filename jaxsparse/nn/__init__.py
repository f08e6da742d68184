# SPDX-License-Identifier: Apache-2.0
"""Linen modules: declare parameters, call ops."""
