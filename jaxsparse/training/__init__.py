# SPDX-License-Identifier: Apache-2.0
"""State, step, optimizers, the loop."""
