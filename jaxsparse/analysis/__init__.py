# SPDX-License-Identifier: Apache-2.0
"""Closed-form costs, usage, plots."""
