# SPDX-License-Identifier: Apache-2.0
"""Low-rank changes of weights: peft's LoRA, factors for masked rows alone, packed deltas."""
