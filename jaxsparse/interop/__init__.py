# SPDX-License-Identifier: Apache-2.0
"""Models of others in, ours out, and more parts for a trained one."""
