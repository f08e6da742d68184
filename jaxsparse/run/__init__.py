# SPDX-License-Identifier: Apache-2.0
"""What a run leaves and says: command line, workdir, checkpoints, metrics."""
