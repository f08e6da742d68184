# SPDX-License-Identifier: Apache-2.0
"""How good a trained model is: log-likelihoods, tasks, differences."""
